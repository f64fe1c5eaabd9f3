"""Weights of means, and shapes that a mean refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from espalier.methods.aggregate import Aggregate
from espalier.wire.payload import Layout
from espalier.wire.sections import MODEL
from espalier_proto import espalier_pb2 as pb
from tests.support.by_hand import (
    Arrays,
    method,
    on_model,
    reply,
    run_tree,
    same,
    server,
    small_tree,
    tapped,
    trained,
    wave,
)


@pytest.mark.parametrize(
    ("name", "settings", "weight"),
    [
        ("fedavg", {}, 40),
        ("fedavg", {"selection": "bernoulli"}, 40),
        ("fedavg", {"selection": "proportional"}, 1),
        ("fedavg", {"selection": "pow-d"}, 1),
        ("fedavg", {"weighting": "uniform"}, 1),
        ("fedprox", {}, 40),
        ("moon", {}, 40),
        ("power-of-choice", {}, 1),
        ("power-of-choice", {"selection": "rpow-d"}, 1),
        ("divfl", {}, 40),
        ("fedpaq", {}, 1),
        ("scaffold", {}, 1),
        ("feddyn", {}, 1),
        ("heterofl", {}, 1),
        ("depthfl", {}, 1),
        ("fjord", {}, 40),
        ("split-mix", {}, 40),
        ("cfl", {}, 1),
        ("ifca", {}, 40),
    ],
)
def test_sampling_and_weighting_never_count_the_samples_twice(
    name: str, settings: dict[str, str], weight: float
) -> None:
    """Uniform sampling weighs by n_k, sampling by n_k does not (Power-of-Choice, q-FFL); some papers say 1/m."""
    state = server({"w": wave(0, 2)})
    update = reply(state, "c", {"w": wave(1, 2)}, samples=40)
    assert method(name, **settings).weight_of(update) == weight


@pytest.mark.parametrize("shape", ["narrow", "flat", "row"])
def test_a_mean_refuses_a_narrow_reply_by_name(shape: str, tmp_path: Path) -> None:
    """A client that answers whole tensors' plan with others, and says so: NumPy would broadcast some of them."""
    tree = small_tree(tmp_path, 3, edges=1)

    def narrowed(sent: Arrays, arrays: Arrays, report: pb.ClientReport) -> Arrays:
        if report.client != "c1":
            return arrays
        name = "hidden2.weight"
        whole = arrays[name]
        part = {"narrow": whole[:16, :16], "flat": whole.reshape(-1), "row": whole[:1]}[shape]
        return arrays | {name: np.ascontiguousarray(part)}

    calls = tapped(tree, on_model(narrowed))
    run = run_tree(tree, "fedavg", 3, rounds=1)
    [fault] = run.recorder.record.faults
    assert (fault.node, fault.kind) == ("c1", "refused")
    assert "'hidden2.weight'" in fault.detail
    own = [call for call in calls if call.plan.client != "c1"]
    total = sum(call.report.samples for call in own)
    expected = {
        n: np.sum([call.report.samples / total * call.payload[n] for call in own], axis=0)
        for n in trained(run)
    }
    same(trained(run), expected)


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, 4), (5, 4), (4, 4, 1), (4,)])
def test_a_tensor_of_another_shape_is_never_broadcast(shape: tuple[int, ...]) -> None:
    """NumPy would broadcast most of these to (4, 4); a slice counts where it lies, anything else is refused."""
    before = wave(0, 4, 4)
    state = server({"w": before})
    tally = Aggregate(state.payload.layouts)
    tally.mean({MODEL: {"w": np.full((4, 4), 2, np.float32)}}, 1.0)
    small = np.full(shape, 6, np.float32)
    if len(shape) == 2 and shape[0] <= 4:
        tally.mean({MODEL: {"w": small}}, 1.0)
        expected = np.full((4, 4), 2, np.float32)
        expected[: shape[0], : shape[1]] = 4
        assert np.array_equal(tally.means(state.payload.views())[MODEL]["w"], expected)
    else:
        with pytest.raises(ValueError, match=r"tensor 'w' has shape .*, the server's is \[4, 4\]"):
            tally.mean({MODEL: {"w": small}}, 1.0)


def test_a_tensor_beyond_two_dimensions_is_whole_there() -> None:
    tally = Aggregate({MODEL: Layout.of({"w": wave(0, 4, 4, 3)})})
    with pytest.raises(ValueError, match="'w' has shape"):
        tally.mean({MODEL: {"w": np.zeros((4, 4, 1), np.float32)}}, 1.0)
