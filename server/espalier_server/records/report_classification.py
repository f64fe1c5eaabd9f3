"""The report's part on classifiers: accuracy over rounds, by class and among clients, and groups of clients."""
# ruff: noqa: RUF001 - typographic dashes of the page

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from espalier.models.presets import is_model
from espalier_server.records.charts import Line, column_chart, line_chart, number
from espalier_server.records.record import AccuracyEntry, RunRecord, WindowEntry
from espalier_server.records.report_template import Card, Table, Tile

_MEAN, _WORST = 8, 9
"""Colours of the clients' curves, behind those of the models."""

_MOST_MODELS, _MOST_CLIENTS = 8, 200

_SPENT = {"histogram": "ε labels", "dp_sgd": "ε DP-SGD", "update": "ε update"}
"""Columns of the privacy that clients spent."""

_NUMERIC = frozenset({"images", "rounds", "signed", "accuracy", *_SPENT.values()})


def percent(share: float | None) -> str:
    """Write a share as a percentage that no line break tears; a dash for None."""
    return "–" if share is None else f"{100 * share:.1f}\u00a0%"


def accuracy_tiles(record: RunRecord) -> list[Tile]:
    """Return the newest accuracies: of the models at the cloud, and of the clients."""
    tiles = []
    measured = [entry for entry in record.accuracy if _best(entry) is not None]
    if measured:
        newest = measured[-1]
        best = max((_best(entry) or 0.0) for entry in measured)
        count = len(newest.models)
        name = "Test accuracy" if count == 1 else f"Test accuracy, best of {count} models"
        tiles.append(Tile(name, percent(_best(newest)), f"best so far {percent(best)}"))
    asked = [entry for entry in record.accuracy if entry.mean is not None]
    if asked:
        note = f"worst 10\u00a0%: {percent(asked[-1].worst10)}"
        tiles.append(Tile("Clients' mean accuracy", percent(asked[-1].mean), note))
    return tiles


def accuracy_cards(record: RunRecord) -> list[Card]:
    """Return the charts of accuracy; without measures they are empty."""
    entries = record.accuracy
    names = list(dict.fromkeys(name for entry in entries for name in entry.models))[:_MOST_MODELS]
    of_models = [
        Line(n, [(float(e.round), _scaled(_of(e, n))) for e in entries], i) for i, n in enumerate(names)
    ]
    means = [(float(e.round), _scaled(e.mean)) for e in entries]
    worst = [(float(e.round), _scaled(e.worst10)) for e in entries]
    of_clients = [
        Line("clients' mean", means, _MEAN, "dashed", marks=False),
        Line("worst 10 % of the clients", worst, _WORST, "dotted", marks=False),
    ]
    losses = [
        Line(n, [(float(e.round), e.models[n].loss if n in e.models else None) for e in entries], i)
        for i, n in enumerate(names)
    ]
    return [
        Card(
            "Accuracy",
            line_chart([*of_models, *of_clients], x_label="round", y_label="accuracy in %"),
            _what_is_measured(entries),
        ),
        Card(
            "Test loss",
            line_chart(losses, x_label="round", y_label="cross-entropy", log=True),
            "mean cross-entropy on the cloud's test images",
        ),
        _by_class(record, names),
        _among_clients(entries),
        _groups(record.windows),
        _selection(record.windows),
    ]


def client_table(record: RunRecord) -> Table:
    """Return the clients: who they are, how often they trained and signed; where known, group and accuracy."""
    trained = Counter(p.client for w in record.windows for r in w.rounds for p in r.participants)
    groups: dict[str, str] = {}
    for window in record.windows:
        groups |= window.assignments
    accuracies: dict[str, float | None] = {}
    for entry in record.accuracy:
        accuracies |= entry.clients
    signed = Counter(p.client for w in record.windows for r in w.rounds for p in r.participants if p.signed)
    columns = ["client", "edges", "images", "data", "device", "rounds", *["signed"] * bool(signed)]
    kept = any(is_model(group) for group in groups.values())
    columns += ["model" if kept else "group"] * bool(groups) + ["accuracy"] * bool(accuracies)
    kinds = [k for k in _SPENT if any(getattr(c.privacy, k) is not None for c in record.clients.values())]
    columns += [_SPENT[kind] for kind in kinds]
    rows = []
    for name, client in sorted(record.clients.items())[:_MOST_CLIENTS]:
        row = [name, ", ".join(client.edges), number(client.samples), client.data, client.device]
        row += [str(trained[name]), *[str(signed[name])] * bool(signed)]
        row += [groups.get(name, "–")] * bool(groups)
        row += [percent(accuracies.get(name))] * bool(accuracies)
        spent = [getattr(client.privacy, kind) for kind in kinds]
        row += ["–" if epsilon is None else f"{epsilon:.3g}" for epsilon in spent]
        rows.append(row)
    numeric = {i for i, column in enumerate(columns) if column in _NUMERIC}
    return Table(columns, rows, frozenset(numeric), max(0, len(record.clients) - _MOST_CLIENTS))


def window_accuracy(record: RunRecord, window: int) -> str:
    """Return the accuracy after a window: the best model's at the cloud, or else the clients' mean."""
    for entry in record.accuracy:
        if entry.window == window:
            best = _best(entry)
            return percent(entry.mean if best is None else best)
    return "–"


def _by_class(record: RunRecord, models: list[str]) -> Card:
    newest = next((e for e in reversed(record.accuracy) if e.models), None)
    lines = []
    for i, name in enumerate(models):
        classes = newest.models[name].classes if newest is not None and name in newest.models else []
        points = [(float(c), _scaled(value)) for c, value in enumerate(classes)]
        lines.append(Line(name, points, i))
    body = line_chart(lines, x_label="class", y_label="accuracy in %", zero=True)
    names = ", ".join(f"{i} {name}" for i, name in enumerate(record.classes))
    plain = all(name == str(i) for i, name in enumerate(record.classes))
    note = "after the newest measure" + ("" if plain or len(names) > 160 else f"; {names}")
    return Card("Accuracy by class", body, note)


def _among_clients(entries: list[AccuracyEntry]) -> Card:
    """Return the clients' accuracies in ascending order, after the first measure and after the newest."""
    asked = [entry for entry in entries if entry.mean is not None]
    lines = []
    for colour, (name, entry) in enumerate({"first": asked[0], "newest": asked[-1]}.items() if asked else ()):
        values = sorted(value for value in entry.clients.values() if value is not None)
        points = [(100 * (i + 1) / len(values), _scaled(value)) for i, value in enumerate(values)]
        if len(asked) > 1 or name == "newest":
            style = "solid" if name == "newest" else "dashed"
            lines.append(Line(f"{name} measure, round {entry.round}", points, 1 - colour, style))
    body = line_chart(lines, x_label="share of the clients in %", y_label="accuracy in %")
    return Card("Accuracy among the clients", body, "each on its own test images, the worst first")


def _groups(windows: list[WindowEntry]) -> Card:
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
        "Groups of clients", body, "clients by cluster, by size of sub-model or by the model they keep"
    )


def _selection(windows: list[WindowEntry]) -> Card:
    asked, picked, rules = [], [], []
    for entry in (round_ for window in windows for round_ in window.rounds):
        if entry.selection is not None and entry.selection.scores:
            scores, chosen = entry.selection.scores, set(entry.selection.picked)
            asked.append((float(entry.round), _mean(scores.values())))
            picked.append((float(entry.round), _mean(v for name, v in scores.items() if name in chosen)))
            rules.append(entry.selection.rule)
    lines = [Line("asked", asked, 0), Line("picked", picked, 1)]
    note = f"mean of what clients were rated by when chosen ({', '.join(dict.fromkeys(rules))})"
    return Card("Selection of clients", line_chart(lines, x_label="round", y_label="score"), note)


def _what_is_measured(entries: list[AccuracyEntry]) -> str:
    samples = max((entry.samples for entry in entries), default=0)
    parts = [f"models on the cloud's {number(samples)} test images"] if samples else []
    if any(entry.clients for entry in entries):
        parts.append("clients on their own")
    return ", ".join(parts)


def _of(entry: AccuracyEntry, model: str) -> float | None:
    return entry.models[model].accuracy if model in entry.models else None


def _best(entry: AccuracyEntry) -> float | None:
    return max((s.accuracy for s in entry.models.values() if s.accuracy is not None), default=None)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _scaled(share: float | None) -> float | None:
    return None if share is None else 100 * share
