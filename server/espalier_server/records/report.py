"""The report page of a run: one self-contained HTML file, rendered from report.json and the sample grids."""
# ruff: noqa: RUF001 - typographic dashes and Greek letters of the page

from __future__ import annotations

import base64
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from espalier.errors import StateError
from espalier.methods.run_config import RunConfig
from espalier.storage.atomic import write_text
from espalier.wire.traffic import CLIENT_EDGE, EDGE_CLOUD, LINKS
from espalier_server.records.events import EVENTS_FILE, read_events
from espalier_server.records.number_format import byte_count, duration, number
from espalier_server.records.rebuild import record_of
from espalier_server.records.record import RunRecord, Traffic, WindowEntry
from espalier_server.records.report_cards import (
    edge_cards,
    loss_card,
    quality_cards,
    run_tiles,
    time_card,
    traffic_card,
)
from espalier_server.records.report_classification import (
    accuracy_cards,
    accuracy_tiles,
    client_table,
    window_accuracy,
)
from espalier_server.records.report_exchange import augmentation_table, exchange_cards

PAGE = "report.html"
_TEMPLATE = "report.html.j2"
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
_DIFFUSION_NOTE = "Samples of the global model from the same initial noise, after the windows shown."
_GENERATOR_NOTE = "Images that the generator makes at each class's prototypes, after the windows shown."
_MAX_GRIDS = 16
_MAX_FAULTS = 200


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
    """Return the report page of a record as HTML; the sample grids are read from ``FOLDER/samples``."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    classified = record.task == "classification"
    # Classification runs have sample grids only if the method has a generator (FedKTL).
    generated = classified and any("alignment-mmd" in window.metrics for window in record.windows)
    cards = [
        *(accuracy_cards(record) if classified else []),
        *(exchange_cards(record) if classified else []),
        loss_card(record),
        *quality_cards(record),
        *edge_cards(record),
        traffic_card(record),
        time_card(record),
    ]
    return environment.from_string(_template()).render(
        record=record,
        title=_title(record),
        subtitle=_subtitle(record),
        tiles=[*accuracy_tiles(record), *run_tiles(record)],
        classified=classified,
        samples=[] if classified and not generated else _sample_grids(folder),
        samples_note=_GENERATOR_NOTE if generated else _DIFFUSION_NOTE,
        augmentation=augmentation_table(record),
        augmentation_note=_augmentation_note(record),
        augmentation_picture=_data_url(folder / "samples" / "augmentation.png")
        if record.augmentation
        else "",
        cards=[card for card in cards if card.body],
        edges=record.edges,
        windows=[_window_row(record, window) for window in record.windows],
        clients=client_table(record),
        faults=record.faults[:_MAX_FAULTS],
        more_faults=max(0, len(record.faults) - _MAX_FAULTS),
        settings=_settings(record),
    )


def _template() -> str:
    return resources.files("espalier_server.records").joinpath(_TEMPLATE).read_text(encoding="utf-8")


def _title(record: RunRecord) -> str:
    return _TITLES.get(record.method, record.method or "Run")


def _subtitle(record: RunRecord) -> str:
    samples = sum(client.samples for client in record.clients.values())
    parts = [
        f"{len(record.clients)} clients with {number(samples)} images, {len(record.edges)} edges",
        f"{sum(len(window.rounds) for window in record.windows)} rounds in {len(record.windows)} windows",
        duration(record.seconds),
        record.started.replace("T", " ").replace("+00:00", " UTC"),
    ]
    return " · ".join(part for part in parts if part)


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
        "client_edge": byte_count(traffic[CLIENT_EDGE].up_bytes + traffic[CLIENT_EDGE].down_bytes),
        "edge_cloud": byte_count(traffic[EDGE_CLOUD].up_bytes + traffic[EDGE_CLOUD].down_bytes),
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


def _sample_grids(folder: Path) -> list[dict[str, object]]:
    """Return at most `_MAX_GRIDS` sample grids, evenly spaced over the run, including the newest one."""
    paths = sorted((folder / "samples").glob("window-*.png"))
    count = min(len(paths), _MAX_GRIDS)
    picked = [paths[round(i * (len(paths) - 1) / max(1, count - 1))] for i in range(count)]
    return [
        {"window": int("".join(filter(str.isdigit, path.stem)) or 0), "data": _data_url(path)}
        for path in picked
    ]


def _data_url(path: Path) -> str:
    """Return an image file as a data URL, "" if it does not exist."""
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
        f"Before the first round, clients uploaded seed images and received a conditional GAN of "
        f"{number(entry.parameters)} parameters: "
        f"{byte_count(traffic.up_bytes)} up and {byte_count(traffic.down_bytes)} down, between clients and edges."
    )
