"""Phoenix: shared images, personal layers and the loss filter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from espalier.data.spec import open_data
from espalier.methods.aggregate import Aggregate
from espalier.methods.phoenix import HANDOUT
from espalier.methods.registry import create_method
from espalier.methods.run_config import RunConfig
from espalier.models.arrays import model_arrays
from espalier.wire.sections import MODEL
from espalier_proto import espalier_pb2 as pb
from tests.support.by_hand import (
    Arrays,
    aggregate,
    method,
    on_model,
    reply,
    run_tree,
    same,
    sample_mean,
    server,
    small_tree,
    tapped,
    wave,
)

#: Quick rounds of a small U-Net, nothing drawn but one small grid.
QUICK = {"model": "unet-tiny", "local_steps": 2, "batch_size": 4, "sample_steps": 1, "sample_count": 1}


def test_phoenix_sends_the_shared_images_once(tmp_path: Path) -> None:
    """A client with few images has more to train on: 8 of its own and 12 shared are five batches of four."""
    tree = small_tree(tmp_path, 3, of=200)
    calls = tapped(tree)
    own = {f"c{i}": len(open_data(f"digits:{i}/200")) for i in range(3)}
    settings = QUICK | {"local_steps": 0, "personal_layers": "conv_in"}
    run = run_tree(
        tree, "phoenix", 3, rounds=3, fraction=0.67, shared_data="digits:199/200", shared_count=6, **settings
    )
    assert run.state is not None
    seen: set[str] = set()
    for call in sorted(calls, key=lambda c: c.plan.round):
        client = call.plan.client
        assert (HANDOUT in call.sent_sections) == (client not in seen)
        if client not in seen:
            assert set(call.sent_sections[HANDOUT]) == {"images", "labels"}
            assert call.sent_sections[HANDOUT]["images"].shape == (6, 1, 8, 8)
        seen.add(client)
        assert list(call.sections) == [MODEL]
        assert call.report.steps == -(-(own[client] + 6) // 4)
        assert call.report.samples == own[client]
    assert len(seen) > 1
    assert len(calls) == 6
    # The images are some of the shared ones, pixel by pixel.
    pool = open_data("digits:199/200")
    everything = ((pool.fetch(np.arange(len(pool))).numpy() + 1) * 127.5).round().astype(np.uint8)
    given = next(c.sent_sections[HANDOUT]["images"] for c in calls if HANDOUT in c.sent_sections)
    assert all(any(np.array_equal(one, other) for other in everything) for one in given)


def test_phoenix_names_the_client_that_the_filter_leaves_out(tmp_path: Path) -> None:
    """c1 claims a loss of ten times the median of the window before: it is not in the mean, and its state goes back."""
    tree = small_tree(tmp_path, 3, of=150, edges=1)

    def claimed(sent: Arrays, arrays: Arrays, report: pb.ClientReport) -> Arrays:
        if (report.client, report.round) == ("c1", 2):
            report.loss *= 10
        return arrays

    calls = tapped(tree, on_model(claimed))
    run = run_tree(tree, "phoenix", 3, rounds=3, quality_threshold=3.0, **QUICK)
    [fault] = run.recorder.record.faults
    assert (fault.node, fault.kind, fault.round) == ("c1", "refused", 2)
    first, second, third = ([c for c in calls if c.plan.round == r] for r in (1, 2, 3))
    limit = 3 * float(np.median([c.report.loss for c in first]))
    left_out = next(c for c in second if c.plan.client == "c1")
    assert f"its loss {left_out.report.loss:.4g} is above {limit:.4g}" in fault.detail
    counted = [c for c in second if c.plan.client != "c1"]
    received = third[0].sent
    same(received, {n: sample_mean(counted, n) for n in received})
    starts = {c.plan.client: (c.plan.start.window, c.plan.start.round) for c in third}
    assert starts == {"c0": (2, 2), "c1": (1, 1), "c2": (2, 2)}


def test_who_was_left_out_with_the_images_gets_them_again() -> None:
    """Its state goes back to before the round, and the images with it."""
    state = server({"w": wave(0, 2)})
    state.memory = {}
    rule = method("phoenix", model="unet-tiny", shared_count=3, quality_threshold=2.0)
    rule.before_run(state, lambda *_: {})
    state.put({HANDOUT: {"images": np.zeros((3, 1, 2, 2), np.uint8), "labels": np.zeros(3, np.int64)}})
    names = ["a", "b", "c"]
    assert set(rule.assign(state, names, {}, 1).values()) == {"shared+data"}
    aggregate(rule, state, [reply(state, n, {"w": wave(1, 2)}, loss=1.0) for n in ("a", "b")])
    with pytest.raises(ValueError, match="left out"):
        aggregate(rule, state, [reply(state, "c", {"w": wave(1, 2)}, loss=9.0)])
    tally = Aggregate(state.payload.layouts)
    rule.add(tally, reply(state, "a", {"w": wave(2, 2)}, loss=1.0), state)
    with pytest.raises(ValueError, match="left out"):
        rule.add(tally, reply(state, "c", {"w": wave(3, 2)}, loss=9.0), state)
    rule.central_step(state, tally)
    assert rule.assign(state, names, {}, 3) == {"a": "shared", "b": "shared", "c": "shared+data"}
    same(state.tensors, {"w": wave(2, 2)})


def test_personal_tensors_start_from_the_runs_own() -> None:
    """Clients initialise the same personal layers without an exchange: the run seed alone determines them."""
    one, two = (
        model_arrays(create_method(RunConfig(method="phoenix", seed=s)).initial((1, 8, 8), 10))
        for s in (5, 5)
    )
    assert all(np.array_equal(one[n], two[n]) for n in one)
