"""Numbers, sizes and durations as text for the report page."""
# ruff: noqa: RUF001 - typographic dashes of the page

from __future__ import annotations


def number(value: float | None) -> str:
    """Format a number with three significant digits, or with thousands separators from 1000 on; None is a dash."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.2g}"


def percent(share: float | None) -> str:
    """Format a share in [0, 1] as a percentage with a no-break space; None is a dash."""
    return "–" if share is None else f"{100 * share:.1f}\u00a0%"


def with_prefix(count: float) -> str:
    """Format a count with four significant digits and an SI prefix, e.g. "1.235 M"."""
    for unit in ("", " k", " M", " G"):
        if abs(count) < 1000:
            return f"{count:.4g}{unit}"
        count /= 1000
    return f"{count:.4g} T"


def byte_count(count: float) -> str:
    """Format a number of bytes with three significant digits, e.g. "1.23 MB"."""
    return with_prefix(float(f"{count:.3g}")) + ("B" if count >= 1000 else " B")


def duration(seconds: float) -> str:
    """Format seconds as hours and minutes, minutes and seconds, or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    )
