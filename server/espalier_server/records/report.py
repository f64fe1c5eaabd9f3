"""The report of a run: one self-contained page made from report.json and the sample grids."""
# ruff: noqa: RUF001 - typographic dashes and Greek letters of the page

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from espalier.errors import StateError
from espalier.methods.run_config import RunConfig
from espalier.storage.atomic import write_text
from espalier.wire.traffic import CLIENT_EDGE, EDGE_CLOUD, LINKS
from espalier_server.records.charts import Line, column_chart, line_chart, number, row_chart
from espalier_server.records.events import EVENTS_FILE, read_events
from espalier_server.records.rebuild import record_of
from espalier_server.records.record import Evaluation, RunRecord, Traffic, WindowEntry
from espalier_server.records.report_classification import (
    accuracy_cards,
    accuracy_tiles,
    client_table,
    window_accuracy,
)
from espalier_server.records.report_exchange import augmentation_table, exchange_cards
from espalier_server.records.report_template import TEMPLATE, Card, Tile

PAGE = "report.html"
_TITLES = {
    "fedphd": "FedPhD",
    "fedphd-os": "FedPhD-OS",
    "fedavg": "FedAvg",
    "fedprox": "FedProx",
    "moon": "MOON",
    "scaffold": "SCAFFOLD",
    "feddyn": "FedDyn",
    "q-fedavg": "q-FedAvg",
    "qfedavg": "q-FedAvg",
    "heterofl": "HeteroFL",
    "fjord": "FjORD",
    "depthfl": "DepthFL",
    "inclusivefl": "InclusiveFL",
    "split-mix": "Split-Mix",
    "ifca": "IFCA",
    "cfl": "CFL",
    "shapefl": "ShapeFL",
    "fedpaq": "FedPAQ",
    "feddiffuse": "FedDiffuse",
    "phoenix": "Phoenix",
    "fd": "FD",
    "fedproto": "FedProto",
    "codistillation": "Co-distillation",
    "fedktl": "FedKTL",
}
_SAMPLED = "The same noise, denoised by the global model after each window shown."
_DRAWN = "What the generator draws where each class's prototypes lie, after each window shown: clients learn from it."
_MOST_PICTURES, _MOST_FAULTS, _MOST_EDGES = 16, 200, 6


def build_report(folder: Path) -> Path:
    """Write ``FOLDER/report.html`` (and report.json, brought up to date from the events) and return its path.

    Raises
    ------
    StateError
        The folder holds no run, or cannot be written to.
    """
    events = read_events(folder / EVENTS_FILE)
    record = record_of(folder, events)
    record.write(folder)
    path = folder / PAGE
    write_text(path, render(record, folder))
    return path


def render(record: RunRecord, folder: Path) -> str:
    """Return the page of a record; sample grids are taken from ``FOLDER/samples``."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    classified = record.task == "classification"
    # Where a classifier's run has pictures, they are of its method's generator.
    drawn = classified and any("alignment-mmd" in window.metrics for window in record.windows)
    cards = [
        *(accuracy_cards(record) if classified else []),
        *(exchange_cards(record) if classified else []),
        _losses(record),
        *_quality_cards(record),
        *_edge_cards(record),
        _traffic(record),
        _timings(record),
    ]
    return environment.from_string(TEMPLATE).render(
        record=record,
        title=_title(record),
        subtitle=_subtitle(record),
        tiles=_tiles(record),
        classified=classified,
        samples=[] if classified and not drawn else _pictures(folder),
        samples_note=_DRAWN if drawn else _SAMPLED,
        augmentation=augmentation_table(record),
        augmentation_note=_augmentation_note(record),
        augmentation_picture=_picture(folder / "samples" / "augmentation.png") if record.augmentation else "",
        cards=[card for card in cards if card.body],
        edges=record.edges,
        windows=[_window_row(record, window) for window in record.windows],
        clients=client_table(record),
        faults=record.faults[:_MOST_FAULTS],
        more_faults=max(0, len(record.faults) - _MOST_FAULTS),
        settings=_settings(record),
    )


def _title(record: RunRecord) -> str:
    return _TITLES.get(record.method, record.method or "Run")


def _subtitle(record: RunRecord) -> str:
    samples = sum(client.samples for client in record.clients.values())
    parts = [
        f"{len(record.clients)} clients with {number(samples)} images, {len(record.edges)} edges",
        f"{sum(len(window.rounds) for window in record.windows)} rounds in {len(record.windows)} windows",
        _duration(record.seconds),
        record.started.replace("T", " ").replace("+00:00", " UTC"),
    ]
    return " · ".join(part for part in parts if part)


def _tiles(record: RunRecord) -> list[Tile]:
    tiles = accuracy_tiles(record)
    if record.quality:
        last = record.quality[-1]
        note = f"real {number(last.floor.frechet)} · noise {number(last.noise.frechet)}"
        tiles.append(Tile(f"Fréchet distance ({_features(last)})", number(last.frechet), note))
    losses = [loss for window in record.windows for loss in window.losses if loss is not None]
    if losses:
        tiles.append(Tile("Training loss", f"{losses[-1]:.4f}", f"from {losses[0]:.4f}"))
    size = record.model
    if size.params:
        pruned = size.params < size.params_dense
        cut = f"{1 - size.params / size.params_dense:.0%} pruned away" if pruned else "dense"
        saved = f"{1 - size.macs / size.macs_dense:.0%} fewer" if pruned and size.macs_dense else "per image"
        tiles.append(Tile("Parameters", _scaled(size.params), cut))
        tiles.append(Tile("Multiply-adds", _scaled(size.macs), saved))
    for link in LINKS:
        traffic = record.links.get(link, Traffic())
        note = f"↑ {_bytes(traffic.up_bytes)} ↓ {_bytes(traffic.down_bytes)}".replace(" ", "\u00a0").replace(
            "\u00a0↓", " ↓"
        )
        tiles.append(Tile(link.replace("-", "–"), _bytes(traffic.up_bytes + traffic.down_bytes), note))
    if checked := sum(window.signatures.cloud for window in record.windows):
        unsigned = {name for window in record.windows for name in window.signatures.unsigned}
        note = f"{len(unsigned)} clients sent some without" if unsigned else "all updates signed"
        tiles.append(Tile("Signatures checked", number(checked), note))
    tiles.append(Tile("Faults", str(len(record.faults)), "see below" if record.faults else "none"))
    return tiles


def _quality_cards(record: RunRecord) -> list[Card]:
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
            lines, x_label="window", y_label=title, log=True, events=_prune_mark(record, "window")
        )
        cards.append(Card(f"{title} ({_features(quality[-1])})", body, notes[measure]))
    return cards


def _losses(record: RunRecord) -> Card:
    points = [(entry.round, entry.loss) for window in record.windows for entry in window.rounds]
    body = line_chart(
        [Line("loss", points)], x_label="round", y_label="loss", events=_prune_mark(record, "round"), log=True
    )
    return Card("Training loss", body, "mean over the clients of each round, by samples")


def _prune_mark(record: RunRecord, unit: str) -> dict[float, str]:
    at = record.model.pruned_at_window if unit == "window" else record.model.pruned_at_round
    return {} if at is None or at == 0 else {float(at): "pruned"}


def _edge_cards(record: RunRecord) -> list[Card]:
    windows = record.windows
    chosen = [
        Line("as chosen", [(w.window, w.mu_planned) for w in windows]),
        Line("random assignment", [(w.window, w.mu_random) for w in windows], 1, "dashed", marks=False),
    ]
    weights = [
        Line(edge, [(w.window, w.rho.get(edge)) for w in windows], i) for i, edge in enumerate(record.edges)
    ]
    reached = [
        Line(f"{edge}, reached", [(w.window, w.mu.get(edge)) for w in windows], i, "dotted", marks=False)
        for i, edge in enumerate(record.edges[:_MOST_EDGES], start=2)
    ]
    classes = record.classes or [
        str(i) for i in range(max((len(c.labels) for c in record.clients.values()), default=0))
    ]
    clients = {
        name: _fit(client.labels, len(classes)) for name, client in sorted(record.clients.items())[:24]
    }
    return [
        Card(
            "Edges' label distributions",
            row_chart(_edge_labels(record, len(classes)), classes, share=True),
            "labels of the samples each edge trained on, over all windows",
        ),
        Card("Clients' label distributions", row_chart(clients, classes), "as they told it; may be noisy"),
        Card(
            "Homogeneity of the edges",
            line_chart([*chosen, *reached], x_label="window", y_label="μ"),
            "mean score the edge choice planned, beside a random assignment, and what each edge reached",
        ),
        Card(
            "Weights of the edges",
            line_chart(weights, x_label="window", y_label="ρ", zero=True),
            "share of each edge in the global model",
        ),
    ]


def _edge_labels(record: RunRecord, classes: int) -> dict[str, list[float]]:
    totals = {edge: [0.0] * classes for edge in record.edges}
    for window in record.windows:
        for edge, counts in window.labels.items():
            row = totals.setdefault(edge, [0.0] * classes)
            for i, count in enumerate(_fit(counts, classes)):
                row[i] += count
    return totals


def _fit(counts: Sequence[float], length: int) -> list[float]:
    return [*counts, *[0.0] * length][:length]


def _traffic(record: RunRecord) -> Card:
    parts: dict[str, list[float]] = {}
    for link in LINKS:
        for way, arrow in (("up_bytes", "↑"), ("down_bytes", "↓")):
            parts[f"{link.replace('-', '–')} {arrow}"] = [
                float(getattr(window.links.get(link, Traffic()), way)) for window in record.windows
            ]
    # Class tables are a thousandth of a model.
    unit, size = (
        ("MB", 1e6)
        if max((n for counts in parts.values() for n in counts), default=0) >= 1e5
        else ("kB", 1e3)
    )
    body = column_chart(
        _numbers(record.windows),
        {name: [count / size for count in counts] for name, counts in parts.items()},
        y_label=unit,
        x_label="window",
        show=lambda v: f"{v:.2f} {unit}",
    )
    return Card("Payload bytes per link", body, "as sent, counted at the sender; ↑ is towards the cloud")


def _timings(record: RunRecord) -> Card:
    names = list(dict.fromkeys(name for window in record.windows for name in window.timings))
    parts = {name: [window.timings.get(name, 0.0) for window in record.windows] for name in names}
    body = column_chart(
        _numbers(record.windows), parts, y_label="seconds", x_label="window", show=lambda v: f"{v:.1f} s"
    )
    return Card("Time", body, "what each window's seconds went into")


def _numbers(windows: Iterable[WindowEntry]) -> list[str]:
    return [str(window.window) for window in windows]


def _window_row(record: RunRecord, window: WindowEntry) -> dict[str, object]:
    rounds = [entry.round for entry in window.rounds]
    traffic = {link: window.links.get(link, Traffic()) for link in LINKS}
    losses = [loss for loss in window.losses if loss is not None]
    return {
        "window": window.window,
        "rounds": f"{rounds[0]}–{rounds[-1]}" if rounds else "",
        "loss": f"{losses[-1]:.4f}" if losses else "–",
        "accuracy": window_accuracy(record, window.window),
        "clients": len(window.participants),
        "edges": [number(values.get(edge)) for edge in record.edges for values in (window.rho, window.mu)],
        "client_edge": _bytes(traffic[CLIENT_EDGE].up_bytes + traffic[CLIENT_EDGE].down_bytes),
        "edge_cloud": _bytes(traffic[EDGE_CLOUD].up_bytes + traffic[EDGE_CLOUD].down_bytes),
        "seconds": f"{sum(window.timings.values()):.1f}",
    }


def _settings(record: RunRecord) -> list[dict[str, object]]:
    defaults = RunConfig().to_flat()
    return [
        {
            "key": key,
            "value": str(value).lower() if isinstance(value, bool) else value,
            "changed": value != defaults.get(key),
        }
        for key, value in record.config.items()
    ]


def _pictures(folder: Path) -> list[dict[str, object]]:
    """Return the sample grids over time, thinned evenly, the newest always among them."""
    paths = sorted((folder / "samples").glob("window-*.png"))
    count = min(len(paths), _MOST_PICTURES)
    picked = [paths[round(i * (len(paths) - 1) / max(1, count - 1))] for i in range(count)]
    return [
        {"window": int("".join(filter(str.isdigit, path.stem)) or 0), "data": _picture(path)}
        for path in picked
    ]


def _picture(path: Path) -> str:
    """Return a picture as a data URL, "" where there is none."""
    try:
        return (
            "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() if path.exists() else ""
        )
    except OSError as error:
        raise StateError(f"cannot read the samples in {path.parent}: {error}") from error


def _augmentation_note(record: RunRecord) -> str:
    entry = record.augmentation
    if entry is None:
        return ""
    traffic = entry.links.get(CLIENT_EDGE, Traffic())
    return (
        f"Before the first round: seed images up, a conditional GAN of {number(entry.parameters)} parameters down; "
        f"{_bytes(traffic.up_bytes)} up and {_bytes(traffic.down_bytes)} down between clients and edges."
    )


def _features(entry: Evaluation) -> str:
    return entry.features if "feature" in entry.features else f"{entry.features} features".strip()


def _scaled(count: float) -> str:
    for unit in ("", " k", " M", " G"):
        if abs(count) < 1000:
            return f"{count:.4g}{unit}"
        count /= 1000
    return f"{count:.4g} T"


def _bytes(count: float) -> str:
    return _scaled(float(f"{count:.3g}")) + ("B" if count >= 1000 else " B")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    )
