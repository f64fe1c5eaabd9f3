"""Report page of a classification run: accuracy over rounds, per class and per client, and groups of clients."""
# ruff: noqa: RUF001 - typographic dashes of the page

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from espalier.models.presets import is_model
from espalier_server.records.charts import Line, column_chart, line_chart
from espalier_server.records.number_format import number, percent
from espalier_server.records.record import AccuracyEntry, RunRecord, WindowEntry
from espalier_server.records.report_parts import Card, Table, Tile

_MEAN_COLOUR, _WORST_COLOUR = 8, 9
"""Colours of the clients' curves; the models use the ones before."""

_MAX_MODELS, _MAX_CLIENTS = 8, 200

_EPSILONS = {"histogram": "ε labels", "dp_sgd": "ε DP-SGD", "update": "ε update"}
"""Columns of the client table with the epsilon that each mechanism spent."""

_NUMERIC = frozenset({"images", "rounds", "signed", "accuracy", *_EPSILONS.values()})


def accuracy_tiles(record: RunRecord) -> list[Tile]:
    """Return tiles with the newest accuracy of the models at the cloud and of the clients."""
    tiles = []
    at_cloud = [entry for entry in record.accuracy if _best_accuracy(entry) is not None]
    if at_cloud:
        newest = at_cloud[-1]
        best = max((_best_accuracy(entry) or 0.0) for entry in at_cloud)
        count = len(newest.models)
        name = "Test accuracy" if count == 1 else f"Test accuracy, best of {count} models"
        tiles.append(Tile(name, percent(_best_accuracy(newest)), f"best so far {percent(best)}"))
    at_clients = [entry for entry in record.accuracy if entry.mean is not None]
    if at_clients:
        note = f"worst 10\u00a0%: {percent(at_clients[-1].worst10)}"
        tiles.append(Tile("Clients' mean accuracy", percent(at_clients[-1].mean), note))
    return tiles


def accuracy_cards(record: RunRecord) -> list[Card]:
    """Return the charts of accuracy, client groups and selection; charts without values have an empty body."""
    entries = record.accuracy
    names = list(dict.fromkeys(name for entry in entries for name in entry.models))[:_MAX_MODELS]
    of_models = [
        Line(n, [(float(e.round), _in_percent(_accuracy_of(e, n))) for e in entries], i)
        for i, n in enumerate(names)
    ]
    means = [(float(e.round), _in_percent(e.mean)) for e in entries]
    worst = [(float(e.round), _in_percent(e.worst10)) for e in entries]
    of_clients = [
        Line("clients' mean", means, _MEAN_COLOUR, "dashed", marks=False),
        Line("worst 10 % of the clients", worst, _WORST_COLOUR, "dotted", marks=False),
    ]
    losses = [
        Line(n, [(float(e.round), e.models[n].loss if n in e.models else None) for e in entries], i)
        for i, n in enumerate(names)
    ]
    return [
        Card(
            "Accuracy",
            line_chart([*of_models, *of_clients], x_label="round", y_label="accuracy in %"),
            _accuracy_note(entries),
        ),
        Card(
            "Test loss",
            line_chart(losses, x_label="round", y_label="cross-entropy", log=True),
            "mean cross-entropy on the cloud's test images",
        ),
        _class_card(record, names),
        _client_accuracy_card(entries),
        _groups_card(record.windows),
        _selection_card(record.windows),
    ]


def client_table(record: RunRecord) -> Table:
    """Return the table of clients: their data, rounds and signatures, and group, accuracy and epsilon if known."""
    trained = Counter(p.client for w in record.windows for r in w.rounds for p in r.participants)
    groups: dict[str, str] = {}
    for window in record.windows:
        groups |= window.assignments
    accuracies: dict[str, float | None] = {}
    for entry in record.accuracy:
        accuracies |= entry.clients
    signed = Counter(p.client for w in record.windows for r in w.rounds for p in r.participants if p.signed)
    columns = ["client", "edges", "images", "data", "device", "rounds", *["signed"] * bool(signed)]
    own_model = any(is_model(group) for group in groups.values())
    columns += ["model" if own_model else "group"] * bool(groups) + ["accuracy"] * bool(accuracies)
    kinds = [k for k in _EPSILONS if any(getattr(c.privacy, k) is not None for c in record.clients.values())]
    columns += [_EPSILONS[kind] for kind in kinds]
    rows = []
    for name, client in sorted(record.clients.items())[:_MAX_CLIENTS]:
        row = [name, ", ".join(client.edges), number(client.samples), client.data, client.device]
        row += [str(trained[name]), *[str(signed[name])] * bool(signed)]
        row += [groups.get(name, "–")] * bool(groups)
        row += [percent(accuracies.get(name))] * bool(accuracies)
        epsilons = [getattr(client.privacy, kind) for kind in kinds]
        row += ["–" if epsilon is None else f"{epsilon:.3g}" for epsilon in epsilons]
        rows.append(row)
    numeric = {i for i, column in enumerate(columns) if column in _NUMERIC}
    return Table(columns, rows, frozenset(numeric), max(0, len(record.clients) - _MAX_CLIENTS))


def window_accuracy(record: RunRecord, window: int) -> str:
    """Return the accuracy after a window as text: of the best model at the cloud, or else the clients' mean."""
    for entry in record.accuracy:
        if entry.window == window:
            best = _best_accuracy(entry)
            return percent(entry.mean if best is None else best)
    return "–"


def _class_card(record: RunRecord, models: list[str]) -> Card:
    newest = next((e for e in reversed(record.accuracy) if e.models), None)
    lines = []
    for i, name in enumerate(models):
        classes = newest.models[name].classes if newest is not None and name in newest.models else []
        points = [(float(c), _in_percent(value)) for c, value in enumerate(classes)]
        lines.append(Line(name, points, i))
    body = line_chart(lines, x_label="class", y_label="accuracy in %", zero=True)
    names = ", ".join(f"{i} {name}" for i, name in enumerate(record.classes))
    plain = all(name == str(i) for i, name in enumerate(record.classes))
    note = "in the newest evaluation" + ("" if plain or len(names) > 160 else f"; {names}")
    return Card("Accuracy by class", body, note)


def _client_accuracy_card(entries: list[AccuracyEntry]) -> Card:
    """Return the chart of the clients' accuracies in ascending order, in the first and the newest evaluation."""
    asked = [entry for entry in entries if entry.mean is not None]
    lines = []
    for colour, (name, entry) in enumerate({"first": asked[0], "newest": asked[-1]}.items() if asked else ()):
        values = sorted(value for value in entry.clients.values() if value is not None)
        points = [(100 * (i + 1) / len(values), _in_percent(value)) for i, value in enumerate(values)]
        if len(asked) > 1 or name == "newest":
            style = "solid" if name == "newest" else "dashed"
            lines.append(Line(f"{name} evaluation, round {entry.round}", points, 1 - colour, style))
    body = line_chart(lines, x_label="share of the clients in %", y_label="accuracy in %")
    return Card("Accuracy across clients", body, "each client on its own test images, in ascending order")


def _groups_card(windows: list[WindowEntry]) -> Card:
    counts = [Counter(window.assignments.values()) for window in windows]
    names = sorted({name for count in counts for name in count})
    body = column_chart(
        [str(window.window) for window in windows],
        {name: [float(count[name]) for count in counts] for name in names},
        y_label="clients",
        x_label="window",
        show=lambda value: f"{value:.0f} clients",
    )
    return Card(
        "Groups of clients", body, "by cluster, by size of the sub-model or by the client's own model"
    )


def _selection_card(windows: list[WindowEntry]) -> Card:
    candidates, selected, rules = [], [], []
    for entry in (round_ for window in windows for round_ in window.rounds):
        if entry.selection is not None and entry.selection.scores:
            scores, chosen = entry.selection.scores, set(entry.selection.picked)
            candidates.append((float(entry.round), _mean(scores.values())))
            selected.append((float(entry.round), _mean(v for name, v in scores.items() if name in chosen)))
            rules.append(entry.selection.rule)
    lines = [Line("candidates", candidates, 0), Line("selected", selected, 1)]
    note = f"mean score of the clients when the sampler ranked them ({', '.join(dict.fromkeys(rules))})"
    return Card("Selection of clients", line_chart(lines, x_label="round", y_label="score"), note)


def _accuracy_note(entries: list[AccuracyEntry]) -> str:
    samples = max((entry.samples for entry in entries), default=0)
    parts = [f"models on {number(samples)} test images at the cloud"] if samples else []
    if any(entry.clients for entry in entries):
        parts.append("clients on their own test images")
    return ", ".join(parts)


def _accuracy_of(entry: AccuracyEntry, model: str) -> float | None:
    return entry.models[model].accuracy if model in entry.models else None


def _best_accuracy(entry: AccuracyEntry) -> float | None:
    return max((s.accuracy for s in entry.models.values() if s.accuracy is not None), default=None)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _in_percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
