"""Tiles and charts of the report page that do not depend on the task: sizes, losses, quality, edges, traffic, time."""
# ruff: noqa: RUF001 - typographic dashes and Greek letters of the page

from __future__ import annotations

from collections.abc import Iterable, Sequence

from espalier.wire.traffic import LINKS
from espalier_server.records.charts import Line, column_chart, line_chart, row_chart
from espalier_server.records.number_format import byte_count, number, with_prefix
from espalier_server.records.record import Evaluation, RunRecord, Traffic, WindowEntry
from espalier_server.records.report_parts import Card, Tile

_MAX_EDGES = 6
_MAX_CLIENTS = 24


def run_tiles(record: RunRecord) -> list[Tile]:
    """Return tiles with the sample quality, loss, model size, traffic, signatures and faults of a run."""
    tiles: list[Tile] = []
    if record.quality:
        last = record.quality[-1]
        note = f"real {number(last.floor.frechet)} · noise {number(last.noise.frechet)}"
        tiles.append(Tile(f"Fréchet distance ({_feature_name(last)})", number(last.frechet), note))
    losses = [loss for window in record.windows for loss in window.losses if loss is not None]
    if losses:
        tiles.append(Tile("Training loss", f"{losses[-1]:.4f}", f"from {losses[0]:.4f}"))
    size = record.model
    if size.params:
        pruned = size.params < size.params_dense
        cut = f"{1 - size.params / size.params_dense:.0%} pruned" if pruned else "dense"
        saved = f"{1 - size.macs / size.macs_dense:.0%} fewer" if pruned and size.macs_dense else "per image"
        tiles.append(Tile("Parameters", with_prefix(size.params), cut))
        tiles.append(Tile("Multiply-adds", with_prefix(size.macs), saved))
    for link in LINKS:
        traffic = record.links.get(link, Traffic())
        note = f"↑ {byte_count(traffic.up_bytes)} ↓ {byte_count(traffic.down_bytes)}".replace(
            " ", "\u00a0"
        ).replace("\u00a0↓", " ↓")
        tiles.append(Tile(link.replace("-", "–"), byte_count(traffic.up_bytes + traffic.down_bytes), note))
    if checked := sum(window.signatures.cloud for window in record.windows):
        unsigned = {name for window in record.windows for name in window.signatures.unsigned}
        note = f"{len(unsigned)} clients sent unsigned updates" if unsigned else "all updates signed"
        tiles.append(Tile("Signatures checked", number(checked), note))
    tiles.append(Tile("Faults", str(len(record.faults)), "see below" if record.faults else "none"))
    return tiles


def quality_cards(record: RunRecord) -> list[Card]:
    """Return a chart per quality measure, with the values of real images, noise and a Gaussian fit as references."""
    quality = record.quality
    if not quality:
        return []
    titles = {
        "frechet": "Fréchet distance",
        "inception_score": "Inception score",
        "kid": "Kernel distance (KID)",
    }
    notes = {"frechet": "lower is better", "inception_score": "higher is better", "kid": "lower is better"}
    cards = []
    for measure, title in titles.items():
        lines = [Line("samples", [(entry.window, getattr(entry, measure)) for entry in quality])]
        for colour, (kind, name) in enumerate(
            {"floor": "real images", "gaussian": "Gaussian fit", "noise": "noise"}.items(), start=1
        ):
            points = [(entry.window, getattr(getattr(entry, kind), measure)) for entry in quality]
            lines.append(Line(name, points, colour, "dashed", marks=False))
        body = line_chart(
            lines, x_label="window", y_label=title, log=True, events=_pruning_event(record, "window")
        )
        cards.append(Card(f"{title} ({_feature_name(quality[-1])})", body, notes[measure]))
    return cards


def loss_card(record: RunRecord) -> Card:
    """Return the chart of the training loss over rounds."""
    points = [(entry.round, entry.loss) for window in record.windows for entry in window.rounds]
    body = line_chart(
        [Line("loss", points)],
        x_label="round",
        y_label="loss",
        events=_pruning_event(record, "round"),
        log=True,
    )
    return Card("Training loss", body, "mean over the clients of each round, by samples")


def edge_cards(record: RunRecord) -> list[Card]:
    """Return the charts of label distributions, and of the edges' homogeneity scores and weights."""
    windows = record.windows
    scores = [
        Line("edge choice", [(w.window, w.mu_planned) for w in windows]),
        Line("random assignment", [(w.window, w.mu_random) for w in windows], 1, "dashed", marks=False),
    ]
    weights = [
        Line(edge, [(w.window, w.rho.get(edge)) for w in windows], i) for i, edge in enumerate(record.edges)
    ]
    reached = [
        Line(f"{edge}, reached", [(w.window, w.mu.get(edge)) for w in windows], i, "dotted", marks=False)
        for i, edge in enumerate(record.edges[:_MAX_EDGES], start=2)
    ]
    classes = record.classes or [
        str(i) for i in range(max((len(c.labels) for c in record.clients.values()), default=0))
    ]
    clients = {
        name: _padded(client.labels, len(classes))
        for name, client in sorted(record.clients.items())[:_MAX_CLIENTS]
    }
    return [
        Card(
            "Edges' label distributions",
            row_chart(_edge_labels(record, len(classes)), classes, share=True),
            "labels of the samples that each edge trained on, over all windows",
        ),
        Card(
            "Clients' label distributions",
            row_chart(clients, classes),
            "as reported by the clients; noisy if histogram-epsilon is set",
        ),
        Card(
            "Homogeneity of the edges",
            line_chart([*scores, *reached], x_label="window", y_label="μ"),
            "mean score of the planned assignment, of a random assignment, and the score that each edge reached",
        ),
        Card(
            "Weights of the edges",
            line_chart(weights, x_label="window", y_label="ρ", zero=True),
            "share of each edge in the global model",
        ),
    ]


def traffic_card(record: RunRecord) -> Card:
    """Return the chart of payload bytes per link and window."""
    parts: dict[str, list[float]] = {}
    for link in LINKS:
        for direction, arrow in (("up_bytes", "↑"), ("down_bytes", "↓")):
            parts[f"{link.replace('-', '–')} {arrow}"] = [
                float(getattr(window.links.get(link, Traffic()), direction)) for window in record.windows
            ]
    # Methods that exchange class tables send kilobytes, not megabytes.
    unit, size = (
        ("MB", 1e6)
        if max((n for counts in parts.values() for n in counts), default=0) >= 1e5
        else ("kB", 1e3)
    )
    body = column_chart(
        _window_numbers(record.windows),
        {name: [count / size for count in counts] for name, counts in parts.items()},
        y_label=unit,
        x_label="window",
        show=lambda v: f"{v:.2f} {unit}",
    )
    return Card("Payload bytes per link", body, "counted at the sender, as encoded; ↑ is towards the cloud")


def time_card(record: RunRecord) -> Card:
    """Return the chart of the seconds that each phase of a window took."""
    names = list(dict.fromkeys(name for window in record.windows for name in window.timings))
    parts = {name: [window.timings.get(name, 0.0) for window in record.windows] for name in names}
    body = column_chart(
        _window_numbers(record.windows),
        parts,
        y_label="seconds",
        x_label="window",
        show=lambda v: f"{v:.1f} s",
    )
    return Card("Time", body, "seconds of each window by phase")


def _pruning_event(record: RunRecord, unit: str) -> dict[float, str]:
    at = record.model.pruned_at_window if unit == "window" else record.model.pruned_at_round
    return {} if at is None or at == 0 else {float(at): "pruned"}


def _edge_labels(record: RunRecord, classes: int) -> dict[str, list[float]]:
    totals = {edge: [0.0] * classes for edge in record.edges}
    for window in record.windows:
        for edge, counts in window.labels.items():
            row = totals.setdefault(edge, [0.0] * classes)
            for i, count in enumerate(_padded(counts, classes)):
                row[i] += count
    return totals


def _padded(counts: Sequence[float], length: int) -> list[float]:
    return [*counts, *[0.0] * length][:length]


def _window_numbers(windows: Iterable[WindowEntry]) -> list[str]:
    return [str(window.window) for window in windows]


def _feature_name(entry: Evaluation) -> str:
    return entry.features if "feature" in entry.features else f"{entry.features} features".strip()
