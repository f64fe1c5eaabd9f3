"""Class tables: what they refuse, and that adding them up over any tree is adding up all clients' rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.errors import WireError
from espalier.wire.class_table import (
    COUNT,
    MEAN,
    PROTOTYPE,
    ROUND,
    SOFT_LABEL,
    UNIT_PROTOTYPE,
    ClassTable,
    given_arrays,
    given_table,
    merge,
)
from espalier.wire.pairs import CENTROIDS, IMAGES, Pairs, from_pixels, to_pixels
from espalier_proto import espalier_pb2 as pb

CLASSES = 4


def soft(labels: list[int], seed: int = 0) -> ClassTable:
    vectors = np.random.default_rng(seed).dirichlet(np.ones(CLASSES), len(labels))
    return ClassTable.of(SOFT_LABEL, CLASSES, labels, vectors.reshape(len(labels), CLASSES))


@st.composite
def clients(draw: st.DrawFn) -> list[ClassTable]:
    """Tables of 1 to 7 clients, each with some of the classes."""
    labels = draw(st.lists(st.sets(st.integers(0, CLASSES - 1)), min_size=1, max_size=7))
    return [soft(sorted(present), seed) for seed, present in enumerate(labels)]


def by_hand(tables: list[ClassTable]) -> dict[int, tuple[np.ndarray, int]]:
    """Return mean and number of holders by class, straight from the rows."""
    rows: dict[int, list[np.ndarray]] = {}
    for table in tables:
        for label, vector in zip(table.labels, table.vectors, strict=True):
            rows.setdefault(int(label), []).append(vector.astype(np.float64))
    return {label: (np.mean(found, axis=0), len(found)) for label, found in rows.items()}


def check(table: ClassTable, expected: dict[int, tuple[np.ndarray, int]]) -> None:
    assert table.labels.tolist() == sorted(expected)
    for label, count, vector in zip(table.labels, table.counts, table.vectors, strict=True):
        mean, holders = expected[int(label)]
        assert count == holders
        np.testing.assert_allclose(vector, mean, atol=1e-6)


@given(clients(), st.data())
def test_any_split_over_edges_merges_to_the_same(tables: list[ClassTable], data: st.DataObject) -> None:
    edges = data.draw(st.lists(st.integers(0, 2), min_size=len(tables), max_size=len(tables)))
    parts = [[t for t, e in zip(tables, edges, strict=True) if e == edge] for edge in set(edges)]
    check(merge(merge(part) for part in parts), by_hand(tables))
    check(merge(tables), by_hand(tables))


@given(clients())
def test_leave_one_out_is_the_mean_over_the_others(tables: list[ClassTable]) -> None:
    whole = merge(tables)
    for place, own in enumerate(tables):
        left = whole.without(own)
        check(left, by_hand(tables[:place] + tables[place + 1 :]))
        left.validate("test", kind=SOFT_LABEL, classes=CLASSES)
        assert (left.vectors >= 0).all()


def test_leave_one_out_by_hand() -> None:
    three = [
        ClassTable.of(PROTOTYPE, 3, [0, 2], np.array([[1.0, 3.0], [5.0, 5.0]])),
        ClassTable.of(PROTOTYPE, 3, [0], np.array([[2.0, 6.0]])),
        ClassTable.of(PROTOTYPE, 3, [0], np.array([[6.0, 0.0]])),
    ]
    whole = merge(three)
    np.testing.assert_allclose(whole.vectors, [[3.0, 3.0], [5.0, 5.0]])
    assert whole.counts.tolist() == [3.0, 1.0]
    left = whole.without(three[0])
    # (9 - 1) / 2 and (9 - 3) / 2; nobody else holds class 2, nobody at all class 1
    assert left.labels.tolist() == [0]
    np.testing.assert_allclose(left.vectors, [[4.0, 3.0]])


@given(clients())
def test_dense_and_back(tables: list[ClassTable]) -> None:
    whole = merge(tables)
    mean, count = whole.dense()
    assert mean.shape == (CLASSES, CLASSES)
    absent = sorted(set(range(CLASSES)) - set(whole.labels.tolist()))
    assert not mean[absent].any()
    assert not count[absent].any()
    back = ClassTable.from_dense(SOFT_LABEL, mean, count)
    np.testing.assert_array_equal(back.vectors, whole.vectors)
    assert (back.labels.tolist(), back.counts.tolist()) == (whole.labels.tolist(), whole.counts.tolist())


def test_unlike_tables_are_not_added() -> None:
    with pytest.raises(ValueError, match="different form"):
        merge([soft([0]), ClassTable.of(PROTOTYPE, CLASSES, [0], np.zeros((1, CLASSES)))])
    with pytest.raises(ValueError, match="stacked"):
        merge([ClassTable.of(UNIT_PROTOTYPE, 2, [0], np.array([[0.6, 0.8]]))])


def test_a_table_travels() -> None:
    table = soft([1, 3])
    message = pb.ClassTable.FromString(table.to_proto().SerializeToString())
    back = ClassTable.from_proto(message, table.vectors, "c1")
    back.validate("c1", kind=SOFT_LABEL, classes=CLASSES)
    np.testing.assert_array_equal(back.labels, table.labels)
    np.testing.assert_array_equal(back.vectors, table.vectors)
    with pytest.raises(WireError, match=r"'c1' refused: class-table vectors float64"):
        ClassTable.from_proto(message, table.vectors.astype(np.float64), "c1")
    with pytest.raises(WireError, match=r"\[1, 4\], expected float32 \[2, 4\]"):
        ClassTable.from_proto(message, table.vectors[:1], "c1")
    message.schema = 9
    with pytest.raises(WireError, match="schema 9"):
        ClassTable.from_proto(message, table.vectors, "c1")


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"kind": PROTOTYPE}, "kind 'prototype'"),
    ({"classes": 5}, "5 classes, this run has 4"),
    ({"vectors": np.full((2, 3), 1 / 3, np.float32)}, "dimension 3, this run's have 4"),
    ({"vectors": np.full((3, 4), 0.25, np.float32)}, "for 2 labels"),
    ({"labels": np.array([1, 1])}, "label 1 repeated"),
    ({"labels": np.array([3, 1])}, r"unsorted \(label 1\)"),
    ({"labels": np.array([1, 4])}, "label 4, labels go from 0 to 3"),
    ({"labels": np.array([-1, 1])}, "label -1"),
    ({"counts": np.array([1.0, -2.0])}, "count -2 for class 3"),
    ({"counts": np.array([0.0, 1.0])}, "count 0 for class 1"),
    ({"counts": np.array([np.nan, 1.0])}, "count nan for class 1"),
    ({"counts": np.array([1.0, np.inf])}, "count inf for class 3"),
    ({"counts": np.array([1.0])}, "1 counts for 2 labels"),
    (
        {"vectors": np.array([[1, 0, 0, 0], [0.5, 0.5, 0.1, 0]], np.float32)},
        "class 3 that is not a distribution",
    ),
    (
        {"vectors": np.array([[1.5, -0.5, 0, 0], [1, 0, 0, 0]], np.float32)},
        "class 1 that is not a distribution",
    ),
    ({"vectors": np.array([[1, 0, 0, 0], [np.nan, 0, 0, 0]], np.float32)}, "class 3 that is not finite"),
]


@pytest.mark.parametrize(("changed", "fault"), FAULTS)
def test_faults_are_named_with_their_sender(changed: dict[str, Any], fault: str) -> None:
    table = soft([1, 3])
    table.validate("c7", kind=SOFT_LABEL, classes=CLASSES)
    with pytest.raises(WireError, match=fault) as caught:
        replace(table, **changed).validate("c7", kind=SOFT_LABEL, classes=CLASSES)
    assert caught.value.sender == "c7"


def test_unit_prototypes_have_norm_one() -> None:
    good = ClassTable.of(UNIT_PROTOTYPE, 2, [0, 1], np.array([[0.6, 0.8], [1.0, 0.0]]))
    good.validate("c", kind=UNIT_PROTOTYPE, classes=2, dimension=2)
    with pytest.raises(WireError, match=r"class 1 of norm 1\.1"):
        replace(good, vectors=np.array([[0.6, 0.8], [1.1, 0.0]], np.float32)).validate(
            "c", kind=UNIT_PROTOTYPE, classes=2, dimension=2
        )
    with pytest.raises(WireError, match="dimension 2, this run's have 3"):
        good.validate("c", kind=UNIT_PROTOTYPE, classes=2, dimension=3)
    # a plain prototype may be of any length
    replace(good, kind=PROTOTYPE, vectors=good.vectors * 9).validate("c", kind=PROTOTYPE, classes=2)


def test_what_clients_are_given() -> None:
    table = merge([soft([0, 2]), soft([2], 5)])
    arrays = given_arrays(table, 7)
    assert int(arrays[ROUND]) == 7
    back = given_table(arrays, SOFT_LABEL, CLASSES, "edge")
    assert back is not None
    np.testing.assert_array_equal(back.vectors, table.vectors)
    assert back.counts.tolist() == [1.0, 2.0]
    nothing: dict[str, np.ndarray] = {
        MEAN: np.zeros((CLASSES, CLASSES), np.float32),
        COUNT: np.zeros(CLASSES),
    }
    assert (
        given_table({}, SOFT_LABEL, CLASSES, "edge")
        is given_table(nothing, SOFT_LABEL, CLASSES, "edge")
        is None
    )
    for wrong in ({COUNT: np.array([1.0])}, {COUNT: -arrays[COUNT]}, {MEAN: arrays[MEAN] * 2}):
        with pytest.raises(WireError, match="'edge'"):
            given_table(arrays | wrong, SOFT_LABEL, CLASSES, "edge")


def test_pixels_keep_images_to_half_a_step() -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (2, 1, 8, 8)).astype(np.float32)
    assert np.abs(from_pixels(to_pixels(images)) - images).max() <= 0.5 / 127.5 + 1e-6
    assert to_pixels(np.array([-1.0, 1.0, 3.0])).tolist() == [0, 255, 255]
    np.testing.assert_array_equal(from_pixels(np.array([0, 255], np.uint8)), [-1.0, 1.0])


def test_pairs_take_the_bytes_of_the_formula() -> None:
    # 10 classes, 32x32x3, H = 512: 143,360 B
    pairs = Pairs(np.zeros((10, 3, 32, 32), np.float32), np.zeros((10, 512), np.float32))
    assert sum(a.nbytes for a in pairs.arrays().values()) == 143_360


def test_pairs_of_another_size_or_type_are_refused() -> None:
    arrays: dict[str, np.ndarray] = {
        IMAGES: np.zeros((2, 1, 8, 8), np.uint8),
        CENTROIDS: np.zeros((2, 5), np.float32),
    }
    pairs = Pairs.received(arrays, (1, 8, 8), "edge")
    assert pairs is not None
    assert (pairs.floats() == -1).all()
    assert Pairs.received({}, (1, 8, 8), "edge") is None
    wrong: list[tuple[dict[str, np.ndarray], str]] = [
        ({IMAGES: np.zeros((2, 3, 8, 8), np.uint8)}, r"uint8 \[3, 8, 8\], expected"),
        ({IMAGES: np.zeros((2, 1, 8, 8))}, "images float64"),
        ({IMAGES: np.full((2, 1, 8, 8), 2, np.float32)}, "outside"),
        ({IMAGES: np.full((2, 1, 8, 8), np.nan, np.float32)}, "outside"),
        ({CENTROIDS: np.zeros((3, 5), np.float32)}, "3 centroids for 2"),
        ({CENTROIDS: np.full((2, 5), np.inf, np.float32)}, "not finite"),
        ({CENTROIDS: np.zeros((2, 5))}, "without float32 centroids"),
    ]
    for changed, fault in wrong:
        with pytest.raises(WireError, match=fault):
            Pairs.received(arrays | changed, (1, 8, 8), "edge")
