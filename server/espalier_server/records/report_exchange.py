"""The report's part on knowledge exchange: unlike models, the losses of what they exchange, and FAug."""
# ruff: noqa: RUF001 - typographic dashes of the page

from __future__ import annotations

from markupsafe import Markup

from espalier.models.presets import is_model
from espalier_server.records.charts import Line, line_chart, number
from espalier_server.records.record import RunRecord, WindowEntry
from espalier_server.records.report_template import Card, Table

_MOST_MODELS, _MOST_CLIENTS = 10, 200
_EXCHANGED = {
    "soft-label-loss": "against the others' soft labels",
    "prototype-loss": "distance to the prototypes",
    "peer-loss": "against the peers' predictions",
}
_ALIGNMENT = {
    "alignment-mmd": "MMD to the generator's latents",
    "alignment-mse": "distance to the centroids",
    "transfer-loss": "transfer at the clients",
}


def own_models(record: RunRecord) -> dict[str, str]:
    """Return the model of each client that keeps one of its own; empty where one model is trained together."""
    found: dict[str, str] = {}
    for window in record.windows:
        found |= {client: group for client, group in window.assignments.items() if is_model(group)}
    return found


def exchange_cards(record: RunRecord) -> list[Card]:
    """Return the charts of knowledge exchange; without measures they are empty."""
    return [
        _by_model(record),
        Card(
            "Knowledge of the others",
            _metrics(record.windows, _EXCHANGED),
            "what clients learn from each other, before its weight; mean over a window's last round",
        ),
        Card(
            "Alignment with the generator",
            _metrics(record.windows, _ALIGNMENT),
            "last epoch of the cloud's feature transformer, and the clients' task on the generated pairs",
        ),
    ]


def augmentation_table(record: RunRecord) -> Table:
    """Return what FAug did by client; without rows where it was not at work."""
    entry = record.augmentation
    columns = ["client", "seeds", "filled in", "leak to server", "leak between"]
    rows = []
    names = sorted({*entry.seeds, *entry.filled}) if entry is not None else []
    for name in names[:_MOST_CLIENTS]:
        assert entry is not None
        rows.append(
            [
                name,
                number(entry.seeds.get(name)),
                number(entry.filled.get(name)),
                _share(entry.leakage_to_server.get(name)),
                _share(entry.leakage_between.get(name)),
            ]
        )
    return Table(columns, rows, frozenset(range(1, 5)), max(0, len(names) - _MOST_CLIENTS))


def _by_model(record: RunRecord) -> Card:
    """Return each model's accuracy: the mean over the clients that keep it."""
    models = own_models(record)
    names = sorted(set(models.values()))
    lines = []
    for colour, name in enumerate(names[:_MOST_MODELS]):
        points: list[tuple[float, float | None]] = []
        for entry in record.accuracy:
            known = [a for c, a in entry.clients.items() if a is not None and models.get(c) == name]
            points.append((float(entry.round), 100 * sum(known) / len(known) if known else None))
        count = sum(model == name for model in models.values())
        lines.append(Line(f"{name}, {count} client{'s' * (count > 1)}", points, colour))
    body = line_chart(lines, x_label="round", y_label="accuracy in %")
    return Card("Accuracy by model", body, "mean over the clients that keep it, on their own test images")


def _metrics(windows: list[WindowEntry], names: dict[str, str]) -> Markup:
    lines = [
        Line(words, [(float(w.window), w.metrics.get(name)) for w in windows], colour)
        for colour, (name, words) in enumerate(names.items())
        if any(w.metrics.get(name) is not None for w in windows)
    ]
    return line_chart(lines, x_label="window", y_label="loss", log=True)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
