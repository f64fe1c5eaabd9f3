from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords, aggregate_metricrecords

from espalier.errors import WireError
from espalier_edge.relay import ReplySum


def reply(value: float, examples: int | None, **metrics: float | list[float]) -> RecordDict:
    numbers: dict[str, int | float | list[int] | list[float]] = dict(metrics)
    if examples is not None:
        numbers["num-examples"] = examples
    arrays = ArrayRecord({"w": Array(np.full((2, 2), value, np.float32)), "b": Array(np.full(3, -value))})
    return RecordDict({"arrays": arrays, "metrics": MetricRecord(numbers)})


def test_equals_flower_on_the_same_replies() -> None:
    replies = [reply(1.0, 10, loss=0.5, per=[1.0, 2.0]), reply(4.0, 30, loss=0.1, per=[3.0, 0.0])]
    total = ReplySum()
    for content in replies:
        total.add(content, "node")
    content = total.content()
    arrays = aggregate_arrayrecords(replies, "num-examples")
    for name, array in content.array_records["arrays"].items():
        np.testing.assert_allclose(array.numpy(), arrays[name].numpy(), rtol=1e-6)
    metrics = aggregate_metricrecords(replies, "num-examples")
    assert content.metric_records["metrics"]["loss"] == pytest.approx(metrics["loss"])
    assert content.metric_records["metrics"]["per"] == pytest.approx(metrics["per"])
    assert content.metric_records["metrics"]["num-examples"] == 40


def test_sums_of_sums_are_the_sum() -> None:
    """Two edges' sums, added up by a stock strategy at the cloud, are the flat sum."""
    replies = [reply(v, n, loss=v) for v, n in ((1.0, 3), (2.0, 5), (7.0, 11))]
    first, second, flat = ReplySum(), ReplySum(), ReplySum()
    for content in replies:
        flat.add(content, "node")
    first.add(replies[0], "node")
    first.add(replies[1], "node")
    second.add(replies[2], "node")
    merged = aggregate_arrayrecords([first.content(), second.content()], "num-examples")
    np.testing.assert_allclose(
        merged["w"].numpy(), flat.content().array_records["arrays"]["w"].numpy(), rtol=1e-6
    )


def test_without_num_examples_only_equal_replies_pass() -> None:
    same = RecordDict({"info": ConfigRecord({"version": "1", "classes": 10})})
    total = ReplySum()
    total.add(same, "node 1")
    total.add(RecordDict({"info": ConfigRecord({"version": "1", "classes": 10})}), "node 2")
    assert total.content() == same
    with pytest.raises(WireError, match="'node 3' refused: its reply differs from the others'"):
        total.add(RecordDict({"info": ConfigRecord({"version": "2", "classes": 10})}), "node 3")
    assert total.replies == 2


@pytest.mark.parametrize("examples", [(10, None), (None, 10)])
def test_mixed(examples: tuple[int | None, int | None]) -> None:
    total = ReplySum()
    total.add(reply(1.0, examples[0]), "node 1")
    with pytest.raises(WireError, match="unlike the others'"):
        total.add(reply(1.0, examples[1]), "node 2")


def test_other_shapes_are_refused() -> None:
    total = ReplySum()
    total.add(reply(1.0, 10), "node 1")
    narrow = reply(1.0, 10)
    narrow["arrays"] = ArrayRecord({"w": Array(np.ones((1, 1), np.float32)), "b": Array(np.ones(3))})
    with pytest.raises(WireError, match="other names or shapes"):
        total.add(narrow, "node 2")
    with pytest.raises(WireError, match="metrics have other names"):
        total.add(reply(1.0, 10, loss=1.0), "node 2")
    assert total.replies == 1


def test_bad_num_examples() -> None:
    with pytest.raises(WireError, match="expected one number from 0 to"):
        ReplySum().add(reply(1.0, -1), "node 1")


def test_nobody() -> None:
    with pytest.raises(WireError, match="none of them gave a usable reply"):
        ReplySum().content()
