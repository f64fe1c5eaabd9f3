"""SVG charts for the report page, which use the colours of its light and dark style sheets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from espalier_server.records.number_format import number

Points = Sequence[tuple[float, float | None]]

WIDTH, HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 10, 12, 40
_COLOURS = 10
"""Number of colours ``--c0``, ``--c1``, … in the page's style sheet."""


@dataclass(frozen=True)
class Line:
    """A curve with a name in the legend.

    Attributes
    ----------
    name : str
        Name in the legend.
    points : sequence of (x, y)
        The curve is interrupted where y is None.
    colour : int
        Index of the colour in the style sheet.
    style : str
        "solid", "dashed" or "dotted".
    marks : bool
        Whether points are marked and show their value as a tooltip.
    """

    name: str
    points: Points
    colour: int = 0
    style: str = "solid"
    marks: bool = True


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic scale from data to pixels, with round tick values."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    ticks: list[float] = field(default_factory=list)

    def place(self, value: float) -> float:
        """Return the position of a value in pixels."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        at = math.log10(max(value, self.low)) if self.log else value
        return self.start + (at - low) / ((high - low) or 1.0) * (self.end - self.start)


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    zero: bool = False,
    events: Mapping[float, str] | None = None,
) -> Markup:
    """Return a chart of curves over a common axis of whole numbers; empty if no curve has a value.

    Parameters
    ----------
    lines : sequence of Line
        The curves.
    x_label, y_label : str
        Axis labels.
    log : bool
        Use a logarithmic y axis if all values are positive and span more than a factor of 20.
    zero : bool
        Start a linear y axis at zero.
    events : mapping of float to str
        Positions on the x axis that are marked by a vertical line, and their labels.
    """
    lines = [line for line in lines if any(y is not None for _, y in line.points)]
    if not lines:
        return Markup()
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points if y is not None]
    positive = [y for y in ys if y > 0]
    log = log and len(positive) == len(ys) and max(ys) / min(ys) > 20
    y_axis = (
        _log_axis(min(ys), max(ys))
        if log
        else _axis(0.0 if zero else min(ys), max(ys), HEIGHT - _BOTTOM, _TOP)
    )
    x_axis = _whole_axis(min(xs), max(xs))
    parts = [_frame(x_axis, y_axis, x_label, y_label)]
    for x, text in (events or {}).items():
        at = f"{x_axis.place(x):.1f}"
        parts.append(f'<line class="event" x1="{at}" x2="{at}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        anchor = "end" if x_axis.place(x) > WIDTH / 2 else "start"
        shift = -5 if anchor == "end" else 5
        parts.append(_text("note", float(at) + shift, _TOP + 11, text, anchor))
    parts += [_curve(line, x_axis, y_axis) for line in lines]
    label = f"{y_label} over {x_label}"
    return Markup(_svg("".join(parts), label)) + legend(
        [(line.name, line.colour, line.style) for line in lines]
    )


def _curve(line: Line, x_axis: Axis, y_axis: Axis) -> str:
    paths, run = [], []
    for x, y in [*line.points, (0.0, None)]:
        if y is not None:
            run.append(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}")
        elif run:
            paths.append("M" + " L".join(run))
            run = []
    colour = f"var(--c{line.colour % _COLOURS})"
    text = f'<path class="curve {line.style}" d="{" ".join(paths)}" style="stroke:{colour}"/>'
    if line.marks:
        few = len(line.points) <= 40
        for x, y in line.points:
            if y is not None:
                text += (
                    f'<circle class="{"mark" if few else "ghost"}" cx="{x_axis.place(x):.1f}" '
                    f'cy="{y_axis.place(y):.1f}" r="{3 if few else 6}" style="fill:{colour}">'
                    f"<title>{escape(line.name)}, {x:g}: {number(y)}</title></circle>"
                )
    return text


def column_chart(
    columns: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    *,
    y_label: str,
    x_label: str,
    show: Callable[[float], str] | None = None,
) -> Markup:
    """Return a chart of stacked columns; empty if all heights are zero.

    Parameters
    ----------
    columns : sequence of str
        Labels of the columns.
    parts : mapping of str to sequence of float
        Name of each part, and its height in each column.
    x_label, y_label : str
        Axis labels.
    show : callable, optional
        Formats a height for its tooltip.
    """
    heights = [sum(values[i] for values in parts.values()) for i in range(len(columns))]
    if not columns or max(heights, default=0.0) <= 0:
        return Markup()
    show = show or number
    y_axis = _axis(0.0, max(heights), HEIGHT - _BOTTOM, _TOP)
    step = (WIDTH - _LEFT - _RIGHT) / len(columns)
    thick = min(46.0, step * 0.72)
    body = [_frame(None, y_axis, x_label, y_label)]
    every = math.ceil(len(columns) / 14)
    for i, column in enumerate(columns):
        x, base = _LEFT + (i + 0.5) * step, 0.0
        for place, (name, values) in enumerate(parts.items()):
            top, bottom = y_axis.place(base + values[i]), y_axis.place(base)
            base += values[i]
            if bottom - top > 0.05:
                body.append(
                    f'<rect class="bar" x="{x - thick / 2:.1f}" y="{top:.1f}" width="{thick:.1f}" '
                    f'height="{bottom - top:.1f}" style="fill:var(--c{place % _COLOURS})">'
                    f"<title>{escape(column)}, {escape(name)}: {escape(show(values[i]))}</title></rect>"
                )
        if i % every == 0:
            body.append(_text("tick", x, HEIGHT - _BOTTOM + 17, column))
    return Markup(_svg("".join(body), f"{y_label} by {x_label}")) + legend(
        [(name, place, "block") for place, name in enumerate(parts)]
    )


def row_chart(rows: Mapping[str, Sequence[float]], parts: Sequence[str], *, share: bool = False) -> Markup:
    """Return a chart of stacked horizontal bars; empty if all lengths are zero.

    Parameters
    ----------
    rows : mapping of str to sequence of float
        Label of each bar, and its values in the order of `parts`.
    parts : sequence of str
        Names of the parts.
    share : bool
        Scale every bar to the same length.
    """
    longest = max((sum(values) for values in rows.values()), default=0.0)
    if longest <= 0:
        return Markup()
    label = min(170, 14 + 7.5 * max(len(name) for name in rows))
    span, row_height = WIDTH - label - 62, 30
    body = []
    for place, (name, values) in enumerate(rows.items()):
        total, y, x = sum(values), place * row_height, float(label)
        scale = span / (total if share and total > 0 else longest)
        body.append(_text("row", label - 8, y + 20, name, "end"))
        for i, value in enumerate(values):
            width = max(0.0, value) * scale
            if width > 0.05:
                body.append(
                    f'<rect class="bar" x="{x:.1f}" y="{y + 5}" width="{width:.1f}" height="{row_height - 10}" '
                    f'style="fill:var(--c{i % _COLOURS})"><title>{escape(name)}, {escape(parts[i])}: '
                    f"{number(value)}</title></rect>"
                )
            x += width
        body.append(_text("tick", x + 6, y + 20, number(total), "start"))
    return Markup(_svg("".join(body), "distribution", height=len(rows) * row_height)) + legend(
        [(name, i, "block") for i, name in enumerate(parts)]
    )


def legend(entries: Sequence[tuple[str, int, str]]) -> Markup:
    """Return the legend for entries (name, colour index, style), where a style is a line's or "block"."""
    if len(entries) < 2:
        return Markup()
    keys = "".join(
        f'<span class="key"><i class="{style}" style="--k:var(--c{colour % _COLOURS})"></i>{escape(name)}</span>'
        for name, colour, style in entries
    )
    return Markup(f'<div class="legend">{keys}</div>')


def _svg(body: str, label: str, height: int = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'


def _frame(x_axis: Axis | None, y_axis: Axis, x_label: str, y_label: str) -> str:
    parts = []
    for tick in y_axis.ticks:
        y = y_axis.place(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    for tick in x_axis.ticks if x_axis else []:
        x = x_axis.place(tick) if x_axis else 0.0
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">{tick:g}</text>'
        )
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    parts.append(_text("label", (_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 3, x_label))
    turn = f'transform="translate(11 {middle}) rotate(-90)"'
    parts.append(f'<text class="label" {turn} text-anchor="middle">{escape(y_label)}</text>')
    return "".join(parts)


def _text(kind: str, x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _axis(low: float, high: float, start: float, end: float) -> Axis:
    if high <= low:
        low, high = low - (abs(low) or 1.0) / 2, low + (abs(low) or 1.0) / 2
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (step * factor) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [round(i * step, 12) for i in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], start, end, ticks=ticks)


def _log_axis(low: float, high: float) -> Axis:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    ticks = [10.0**i for i in range(first, last + 1, math.ceil((last - first) / 6))]
    return Axis(10.0**first, 10.0**last, HEIGHT - _BOTTOM, _TOP, log=True, ticks=ticks)


def _whole_axis(low: float, high: float) -> Axis:
    if high <= low:
        low, high = low - 1, high + 1
    step = max(1, math.ceil((high - low) / 10))
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if s >= step)
    ticks = [float(x) for x in range(math.ceil(low / step) * step, math.floor(high) + 1, step)]
    return Axis(low, high, _LEFT + 8, WIDTH - _RIGHT - 8, ticks=ticks)
