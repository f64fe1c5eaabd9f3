"""What knowledge exchange refuses: a bad table or bad pairs cost their sender a round, not the run; and NaN."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from espalier.wire import control
from espalier.wire.class_table import COUNT, MEAN, REPLY, ROUND, TABLE, VECTORS
from espalier.wire.pairs import CENTROIDS, IMAGES, PAIRS
from espalier.wire.sections import Payload, layouts_to_proto
from espalier_proto import espalier_pb2 as pb
from espalier_server.records.record import RunRecord
from tests.support.by_hand import Arrays, Nested, run_tree, small_tree, tapped
from tests.support.exchanges import rows, training
from tests.support.generators import random_gan

#: Changes a table, in place of its message, and returns its vectors.
Spoil = Callable[[pb.ClassTable, np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def gan(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_gan(tmp_path_factory.mktemp("generators") / "gan")


def classes(table: pb.ClassTable, vectors: np.ndarray) -> np.ndarray:
    table.classes = 11
    return vectors


def dimension(table: pb.ClassTable, vectors: np.ndarray) -> np.ndarray:
    table.dimension = 9
    return np.ascontiguousarray(vectors[:, :9])


def too_many(table: pb.ClassTable, vectors: np.ndarray) -> np.ndarray:
    more = 11 - len(vectors)
    table.labels.extend([9] * more)
    return np.concatenate([vectors, vectors[:more]])


def hidden_row(table: pb.ClassTable, vectors: np.ndarray) -> np.ndarray:
    """Send a row more than the table speaks of."""
    return np.concatenate([vectors, vectors[:1]])


def label(table: pb.ClassTable, vectors: np.ndarray) -> np.ndarray:
    table.labels[-1] = 10
    return vectors


def repeated(table: pb.ClassTable, vectors: np.ndarray) -> np.ndarray:
    table.labels[1] = table.labels[0]
    return vectors


def negative_count(table: pb.ClassTable, vectors: np.ndarray) -> np.ndarray:
    table.counts[0] = -1
    return vectors


def endless_count(table: pb.ClassTable, vectors: np.ndarray) -> np.ndarray:
    table.counts[0] = float("nan")
    return vectors


def kind(table: pb.ClassTable, vectors: np.ndarray) -> np.ndarray:
    table.kind = "raw-logits"
    return vectors


def doubled(table: pb.ClassTable, vectors: np.ndarray) -> np.ndarray:
    return vectors * np.float32(2)


def logits(table: pb.ClassTable, vectors: np.ndarray) -> np.ndarray:
    """Send a row that sums to 1 but is none of probabilities."""
    changed = vectors.copy()
    changed[0, 0] -= 1
    changed[0, 1] += 1
    return changed


def nothing(table: pb.ClassTable, vectors: np.ndarray) -> np.ndarray:
    table.Clear()
    return vectors[:0]


def not_finite(table: pb.ClassTable, vectors: np.ndarray) -> np.ndarray:
    return np.where(np.arange(10) == 3, np.float32("nan"), vectors)


FAULTS: list[tuple[str, Spoil, str]] = [
    ("fd", classes, "a class table of 11 classes, this run has 10"),
    ("fd", dimension, "vectors of length 9, at most 10 of length 10 are expected"),
    ("fd", too_many, "a table of 11 vectors of length 10, at most 10"),
    ("fd", hidden_row, r"'vectors' is float32\[10, 10\], expected float32\[9, 10\]"),
    ("fd", label, "a class table with label 10, labels go from 0 to 9"),
    ("fd", repeated, "a class table with label 0 repeated"),
    ("fd", negative_count, "the count -1 for class 0; a count is positive and finite"),
    ("fd", endless_count, "the count nan for class 0; a count is positive and finite"),
    ("fd", kind, "a class table of kind 'raw-logits', this run exchanges 'soft-label'"),
    ("fd", doubled, "a soft label of class 0 that is not a distribution"),
    ("fd", logits, "a soft label of class 0 that is not a distribution"),
    ("fd", nothing, "a table of 0 vectors of length 0"),
    ("fd", not_finite, "tensor 'vectors' holds a value that is not finite"),
    ("fedproto", dimension, "vectors of length 9, at most 10 of length 64 are expected"),
    ("fedproto", classes, "a class table of 11 classes, this run has 10"),
    ("fedktl", classes, "a class table of 11 classes, this run has 10"),
    ("fedktl", doubled, "a prototype of class 0 of norm 2, this run's have norm 1"),
    ("fedktl", negative_count, "the count -1 for class 0; a count is positive and finite"),
]


@pytest.mark.parametrize(
    ("method", "spoil", "fault"), FAULTS, ids=[f"{m}-{s.__name__}" for m, s, _ in FAULTS]
)
def test_a_bad_table_is_refused_by_name_and_the_round_goes_on(
    method: str, spoil: Spoil, fault: str, tmp_path: Path, gan: str
) -> None:
    def change(_: Nested, sections: Nested, report: pb.ClientReport) -> Nested:
        if report.client != "c1" or report.round != 1:
            return sections
        return {REPLY: {VECTORS: spoil(report.table, sections[REPLY][VECTORS])}}

    tree = small_tree(tmp_path, 2, 60, 1)
    calls = tapped(tree, change)
    settings: dict[str, Any] = {"families": "cnn" if method == "fedproto" else "logistic"}
    if method == "fedktl":
        settings |= {"generator": gan, "alignment_epochs": 1}
    run = run_tree(tree, method, 2, **settings, rounds=2)
    [found] = run.recorder.record.faults
    assert (found.node, found.kind, found.round) == ("c1", "refused", 1)
    assert re.search(fault, found.detail), found.detail
    assert participants(run.recorder.record) == [["c0"], ["c0", "c1"]]
    # What c0 told was taken: it is in what both are sent next.
    own, sent = rows(training(calls, 1)["c0"]), training(calls, 2)["c1"].sent_sections
    if method == "fedktl":
        assert len(sent[PAIRS][CENTROIDS]) == len(own) >= 9
    else:
        assert np.flatnonzero(sent[TABLE][COUNT]).tolist() == sorted(own)
        np.testing.assert_array_equal(sent[TABLE][MEAN][sorted(own)], np.stack([own[c] for c in sorted(own)]))


def test_a_window_without_a_last_round_keeps_the_previous_table(
    tmp_path: Path,
) -> None:
    def change(_: Nested, sections: Nested, report: pb.ClientReport) -> Nested:
        if report.round != 2:
            return sections
        return {REPLY: {VECTORS: doubled(report.table, sections[REPLY][VECTORS])}}

    tree = small_tree(tmp_path, 2, 60, 1)
    calls = tapped(tree, change)
    run = run_tree(tree, "fd", 2, families="logistic", rounds=3, rg=2)
    assert [f.kind for f in run.recorder.record.faults] == ["refused", "refused", "quorum"]
    third = training(calls, 3)
    # What round 3 is given is round 1's table and says so, so that a client takes out its own part of that one.
    first = [rows(call) for call in training(calls, 1).values()]
    for call in third.values():
        assert int(call.sent_sections[TABLE][ROUND]) == 1
        for label in first[0].keys() & first[1].keys():
            expected = np.mean([f[label] for f in first], axis=0)
            np.testing.assert_allclose(call.sent_sections[TABLE][MEAN][label], expected, rtol=1e-5)
        assert call.sent_sections[TABLE][COUNT].max() == 2


def participants(record: RunRecord) -> list[list[str]]:
    return [[p.client for p in entry.participants] for w in record.windows for entry in w.rounds]


def larger(sent: Arrays) -> Arrays:
    return sent | {IMAGES: np.zeros((10, 1, 9, 9), np.uint8)}


def coloured(sent: Arrays) -> Arrays:
    return sent | {IMAGES: np.zeros((10, 3, 8, 8), np.float32)}


def whole_numbers(sent: Arrays) -> Arrays:
    return sent | {IMAGES: sent[IMAGES].astype(np.int64)}


def fewer(sent: Arrays) -> Arrays:
    return sent | {CENTROIDS: sent[CENTROIDS][:9]}


def beyond(sent: Arrays) -> Arrays:
    return sent | {IMAGES: np.full((10, 1, 8, 8), 2, np.float32)}


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (larger, r"generated images uint8 \[1, 9, 9\], expected float32 or uint8 \[1, 8, 8\]"),
        (coloured, r"generated images float32 \[3, 8, 8\], expected"),
        (whole_numbers, r"generated images int64 \[1, 8, 8\], expected"),
        (fewer, "9 centroids for 10 generated images"),
        (beyond, r"generated images outside \[-1, 1\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_pairs_are_refused_by_the_client(
    spoil: Callable[[Arrays], Arrays], fault: str, tmp_path: Path, gan: str
) -> None:
    tree = small_tree(tmp_path, 2, 60, 1)
    node = tree.edges[0][1]
    app = node.app

    def tampered(message: Message, context: Any) -> Message:
        data = control.plan_bytes(message)
        if message.metadata.message_type == control.TRAIN and data is not None:
            plan = control.decode(pb.RoundPlan, data, "edge")
            sent = control.read_payload(message, control.plan_sections(plan, "edge"), "edge").views()
            if PAIRS in sent:
                payload = Payload.pack({PAIRS: spoil(dict(sent[PAIRS]))})
                plan.ClearField("sections")
                plan.sections.extend(layouts_to_proto(payload.layouts))
                message.content = control.plan_content(plan, payload)
        return app(message, context)

    node.app = tampered
    run = run_tree(tree, "fedktl", 2, families="logistic", rounds=2, generator=gan, alignment_epochs=1)
    [found] = run.recorder.record.faults
    assert (found.node, found.round) == ("c1", 2)
    assert re.search(fault, found.detail), found.detail
    assert participants(run.recorder.record) == [["c0", "c1"], ["c0"]]


@pytest.mark.parametrize("method", ["fd", "fedproto", "codistillation", "fedktl"])
def test_two_hundred_rounds_stay_finite(method: str, tmp_path: Path, gan: str) -> None:
    """With default settings; raw logits as soft labels are what runs away."""
    tree = small_tree(tmp_path, 2, 120, 1)
    own = {"generator": gan} if method == "fedktl" else {}
    run = run_tree(tree, method, 2, families="mlp", rounds=200, rg=50, **own)
    record = run.recorder.record
    assert record.faults == []
    losses = [loss for window in record.windows for loss in window.losses]
    assert len(losses) == 200
    assert all(loss is not None and np.isfinite(loss) for loss in losses)
    measured = [value for window in record.windows for value in window.metrics.values()]
    assert measured
    assert all(value is not None and np.isfinite(value) for value in measured)
    assert run.state is not None
    sections = run.state.payload.views()
    assert any(sections.values())
    for section, arrays in sections.items():
        for name, array in arrays.items():
            assert np.isfinite(array).all(), (section, name)
