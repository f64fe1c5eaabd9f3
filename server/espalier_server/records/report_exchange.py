"""Report page of a run with knowledge exchange: accuracy per model, losses of the exchange, and FAug."""
# ruff: noqa: RUF001 - typographic dashes of the page

from __future__ import annotations

from markupsafe import Markup

from espalier.models.presets import is_model
from espalier_server.records.charts import Line, line_chart
from espalier_server.records.number_format import number
from espalier_server.records.record import RunRecord, WindowEntry
from espalier_server.records.report_parts import Card, Table

_MAX_MODELS, _MAX_CLIENTS = 10, 200
_EXCHANGE_LOSSES = {
    "soft-label-loss": "against the soft labels of other clients",
    "prototype-loss": "distance to the prototypes",
    "peer-loss": "against the predictions of the peers",
}
_ALIGNMENT_LOSSES = {
    "alignment-mmd": "MMD to the generator's latents",
    "alignment-mse": "distance to the centroids",
    "transfer-loss": "transfer loss at the clients",
}


def own_models(record: RunRecord) -> dict[str, str]:
    """Return the model of each client that has its own; empty if all clients train one global model."""
    found: dict[str, str] = {}
    for window in record.windows:
        found |= {client: group for client, group in window.assignments.items() if is_model(group)}
    return found


def exchange_cards(record: RunRecord) -> list[Card]:
    """Return the charts of knowledge exchange; charts without values have an empty body."""
    return [
        _model_card(record),
        Card(
            "Knowledge exchange",
            _loss_chart(record.windows, _EXCHANGE_LOSSES),
            "loss of the exchange before its weight; mean over the clients of a window's last round",
        ),
        Card(
            "Alignment with the generator",
            _loss_chart(record.windows, _ALIGNMENT_LOSSES),
            "last epoch of the feature transformer at the cloud, and the clients' loss on the generated pairs",
        ),
    ]


def augmentation_table(record: RunRecord) -> Table:
    """Return the table of FAug's augmentation per client; without rows if the run did not use it."""
    entry = record.augmentation
    columns = ["client", "seeds", "generated", "leakage to server", "leakage to clients"]
    rows = []
    names = sorted({*entry.seeds, *entry.filled}) if entry is not None else []
    for name in names[:_MAX_CLIENTS]:
        assert entry is not None
        rows.append(
            [
                name,
                number(entry.seeds.get(name)),
                number(entry.filled.get(name)),
                _three_decimals(entry.leakage_to_server.get(name)),
                _three_decimals(entry.leakage_between.get(name)),
            ]
        )
    return Table(columns, rows, frozenset(range(1, 5)), max(0, len(names) - _MAX_CLIENTS))


def _model_card(record: RunRecord) -> Card:
    """Return the chart of each model's accuracy, a mean over the clients that have it."""
    models = own_models(record)
    names = sorted(set(models.values()))
    lines = []
    for colour, name in enumerate(names[:_MAX_MODELS]):
        points: list[tuple[float, float | None]] = []
        for entry in record.accuracy:
            known = [a for c, a in entry.clients.items() if a is not None and models.get(c) == name]
            points.append((float(entry.round), 100 * sum(known) / len(known) if known else None))
        count = sum(model == name for model in models.values())
        lines.append(Line(f"{name}, {count} client{'s' * (count > 1)}", points, colour))
    body = line_chart(lines, x_label="round", y_label="accuracy in %")
    return Card("Accuracy by model", body, "mean over the clients with this model, on their own test images")


def _loss_chart(windows: list[WindowEntry], names: dict[str, str]) -> Markup:
    lines = [
        Line(label, [(float(w.window), w.metrics.get(name)) for w in windows], colour)
        for colour, (name, label) in enumerate(names.items())
        if any(w.metrics.get(name) is not None for w in windows)
    ]
    return line_chart(lines, x_label="window", y_label="loss", log=True)


def _three_decimals(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
