"""FedDiffuse and Phoenix as whole methods: what leaves a client, what stays, and what it is averaged to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from espalier.config.run_config import RunConfig
from espalier.data.spec import open_data
from espalier.methods.registry import create_method
from espalier.methods.tally import Tally
from espalier.models.arrays import model_arrays
from espalier_client.state import StateStore
from espalier_proto import espalier_pb2 as pb
from espalier_server.run import TreeRun
from tests.support.by_hand import trained
from tests.support.by_hand import (
    Arrays,
    Call,
    aggregate,
    kept,
    method,
    reply,
    run_tree,
    same,
    server,
    small_tree,
    tapped,
    wave,
)

#: Quick rounds of a small U-Net, nothing drawn but one small grid.
QUICK = {"model": "unet-tiny", "local_steps": 2, "batch_size": 4, "sample_steps": 1, "sample_count": 1}
SPEC = "digits:{i}/{of}:dirichlet=0.5"


def part(name: str) -> str:
    """Say which part of the U-Net a tensor is in, by the list in §3 of the paper."""
    head = name.split(".")[0]
    parts = {"conv_in": "down", "time_embedding": "down", "down_blocks": "down", "mid_block": "mid"}
    parts |= {"up_blocks": "up", "conv_norm_out": "up", "conv_out": "up"}
    return parts[head]


def parts_of(call: Call) -> frozenset[str]:
    return frozenset(part(n) for n in call.payload)


def sizes(arrays: Arrays) -> dict[str, int]:
    found = dict.fromkeys(("down", "mid", "up"), 0)
    for name, array in arrays.items():
        found[part(name)] += array.nbytes
    return found



def weighted(calls: Sequence[Call], name: str) -> np.ndarray:
    """Return the n_k-weighted mean of a tensor over those who sent it, number by number in float64."""
    holders = [c for c in calls if name in c.payload]
    total = sum(c.report.samples for c in holders)
    mean: np.ndarray = np.sum(
        [c.report.samples / total * c.payload[name].astype(np.float64) for c in holders], axis=0
    )
    return mean


# --- FedDiffuse --------------------------------------------------------------------------------------


def test_usplits_pairs_send_complementary_parts(tmp_path: Path) -> None:
    tree = small_tree(tmp_path, 5, of=150, data=SPEC, reach=lambda i: (i % 2,))
    calls = tapped(tree)
    run = run_tree(tree, "feddiffuse", 5, rounds=3, **QUICK)
    whole = sizes(trained(run))
    assert all(call.sent.keys() == trained(run).keys() for call in calls)
    for round_ in (1, 2, 3):
        own = [c for c in calls if c.plan.round == round_]
        sent = [parts_of(c) for c in own]
        # Two pairs, who together send the network once a pair, and one client without a partner.
        assert sent.count(frozenset({"down", "mid", "up"})) == 1
        assert sent.count(frozenset({"down", "mid"})) == sent.count(frozenset({"up"}))
        assert sent.count(frozenset({"down"})) == sent.count(frozenset({"mid", "up"}))
        assert len(sent) == 5
        # A part is sent whole or not at all, so a pair's bytes are the network's.
        for call in own:
            for name, size in sizes(call.payload).items():
                assert size == (whole[name] if name in parts_of(call) else 0)
        assert sum(sum(sizes(c.payload).values()) for c in own) == 3 * sum(whole.values())
    last = [c for c in calls if c.plan.round == 3]
    same(trained(run), {n: weighted(last, n) for n in trained(run)})
    # Who sends what changes from round to round.
    who = [{c.plan.client: parts_of(c) for c in calls if c.plan.round == r} for r in (1, 2, 3)]
    assert who[0] != who[1] or who[1] != who[2]


@pytest.mark.parametrize(
    ("exchange", "shared"), [("full", "down mid up"), ("ulatdec", "mid up"), ("udec", "up")]
)
def test_bytes_of_the_exchange_are_the_shares_of_its_parts(
    exchange: str, shared: str, tmp_path: Path
) -> None:
    tree = small_tree(tmp_path, 2, of=150)
    calls = tapped(tree)
    run = run_tree(tree, "feddiffuse", 2, rounds=1, exchange=exchange, **QUICK)
    whole = sizes(trained(run))
    expected = sum(whole[p] for p in shared.split())
    for call in calls:
        assert {part(n) for n in call.sent} == {part(n) for n in call.payload} == set(shared.split())
        assert sum(a.nbytes for a in call.payload.values()) == expected
        assert sum(a.nbytes for a in call.sent.values()) == expected
        # Names, shapes and the report beside the tensors are small.
        assert expected <= call.report.up_bytes <= expected + 20_000
    share = expected / sum(whole.values())
    # Of this U-Net: down 0.1935, mid 0.2589, up 0.5476 (the paper's has other shares).
    assert share == pytest.approx({"full": 1.0, "ulatdec": ULATDEC, "udec": UDEC}[exchange], abs=0.001)


ULATDEC, UDEC = 0.8065, 0.5476


def test_udecs_encoder_never_leaves_a_client(tmp_path: Path) -> None:
    """Neither under its name nor as bytes in anything the client sends; the cloud's own copy stays as it was."""
    tree = small_tree(tmp_path, 2, of=150)
    calls = tapped(tree)
    run = run_tree(tree, "feddiffuse", 2, rounds=2, exchange="udec", **QUICK)
    assert run.state is not None
    before = model_arrays(run.method.initial((1, 8, 8), 10))
    for client in ("c0", "c1"):
        mine = {
            n.removeprefix("personal/"): a
            for n, a in kept(tmp_path, client).items()
            if n.startswith("personal/")
        }
        assert {part(n) for n in mine} == {"down", "mid"}
        [raw] = [c.raw for c in calls if c.plan.client == client and c.plan.round == 2]
        moved = {n: a for n, a in mine.items() if a.nbytes >= 64 and not np.array_equal(a, before[n])}
        assert len(moved) > 20
        for array in moved.values():
            assert array.tobytes()[:64] not in raw
        payload = next(c.payload for c in calls if c.plan.client == client and c.plan.round == 2)
        assert payload["conv_out.weight"].tobytes()[:64] in raw  # what was sent is found there
    assert not any(part(n) != "up" for c in calls for n in (*c.sent, *c.payload))
    at_cloud = {n: a for n, a in trained(run).items() if part(n) != "up"}
    assert all(np.array_equal(a, before[n]) for n, a in at_cloud.items())
    assert run.assessment is not None
    assert [n.at_cloud for n in run.assessment.networks()] == [False]


def test_personal_layers_survive_from_round_to_round(tmp_path: Path) -> None:
    """The second round's step size is next to nothing, so its end shows where it began: at the first's end."""
    tree = small_tree(tmp_path, 2, of=150)
    run = run_tree(
        tree,
        "feddiffuse",
        2,
        rounds=2,
        exchange="udec",
        learning_rate=0.01,
        warmup_steps=1,
        learning_rate_decay=1e-7,
        **QUICK,
    )
    start = model_arrays(run.method.initial((1, 8, 8), 10))
    for client in ("c0", "c1"):
        second = kept(tmp_path, client)
        first = StateStore(tmp_path / "clients" / client / "rounds").load("r", (1, 1))
        names = [n for n in first if n.startswith("personal/")]
        assert names
        for name in names:
            np.testing.assert_allclose(second[name], first[name], atol=1e-7)
        moved = [not np.allclose(first[n], start[n.removeprefix("personal/")], atol=1e-4) for n in names]
        assert sum(moved) > len(names) / 2
    own = [kept(tmp_path, c)["personal/conv_in.weight"] for c in ("c0", "c1")]
    assert not np.allclose(own[0], own[1], atol=1e-4)  # each has its own


# --- Phoenix -----------------------------------------------------------------------------------------


def test_phoenix_hands_the_shared_images_to_everybody_once(tmp_path: Path) -> None:
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
        assert ("handout/images" in call.sent) == ("handout/labels" in call.sent) == (client not in seen)
        if client not in seen:
            assert call.sent["handout/images"].shape == (6, 1, 8, 8)
        seen.add(client)
        assert not any(n.startswith("handout") for n in call.payload)
        assert call.report.steps == -(-(own[client] + 6) // 4)
        assert call.report.samples == own[client]
    assert len(seen) > 1
    assert len(calls) == 6
    # The images are some of the shared ones, pixel by pixel.
    pool = open_data("digits:199/200")
    everything = ((pool.fetch(np.arange(len(pool))).numpy() + 1) * 127.5).round().astype(np.uint8)
    given = next(c.sent["handout/images"] for c in calls if "handout/images" in c.sent)
    assert all(any(np.array_equal(one, other) for other in everything) for one in given)


def test_phoenix_names_the_client_that_the_filter_leaves_out(tmp_path: Path) -> None:
    """c1 claims a loss of ten times the median of the window before: it is not in the mean, and its state goes back."""
    tree = small_tree(tmp_path, 3, of=150, edges=1)

    def claimed(sent: Arrays, arrays: Arrays, report: pb.ClientReport) -> Arrays:
        if (report.client, report.round) == ("c1", 2):
            report.loss *= 10
        return arrays

    calls = tapped(tree, claimed)
    run = run_tree(tree, "phoenix", 3, rounds=3, quality_threshold=3.0, **QUICK)
    [fault] = run.chronicle.record.faults
    assert (fault.node, fault.kind, fault.round) == ("c1", "refused", 2)
    first, second, third = ([c for c in calls if c.plan.round == r] for r in (1, 2, 3))
    limit = 3 * float(np.median([c.report.loss for c in first]))
    left_out = next(c for c in second if c.plan.client == "c1")
    assert f"its loss {left_out.report.loss:.4g} is above {limit:.4g}" in fault.detail
    counted = [c for c in second if c.plan.client != "c1"]
    received = third[0].sent
    same(received, {n: weighted(counted, n) for n in received})
    starts = {c.plan.client: (c.plan.start.window, c.plan.start.round) for c in third}
    assert starts == {"c0": (2, 2), "c1": (1, 1), "c2": (2, 2)}


def test_who_was_left_out_with_the_images_gets_them_again() -> None:
    """Its state goes back to before the round, and the images with it."""
    state = server({"w": wave(0, 2)})
    state.extra = {}
    rule = method("phoenix", model="unet-tiny", shared_count=3, quality_threshold=2.0)
    rule.before_run(state, lambda *_: {})
    state.weights = type(state.weights).pack(
        state.tensors
        | {"handout/images": np.zeros((3, 1, 2, 2), np.uint8), "handout/labels": np.zeros(3, np.int64)}
    )
    names = ["a", "b", "c"]
    assert set(rule.assign(state, names, {}, 1).values()) == {"shared+data"}
    aggregate(rule, state, [reply(state, n, {"w": wave(1, 2)}, loss=1.0) for n in ("a", "b")])
    with pytest.raises(ValueError, match="left out"):
        aggregate(rule, state, [reply(state, "c", {"w": wave(1, 2)}, loss=9.0)])
    tally = Tally(state.weights.layout)
    rule.add(tally, reply(state, "a", {"w": wave(2, 2)}, loss=1.0), state)
    with pytest.raises(ValueError, match="left out"):
        rule.add(tally, reply(state, "c", {"w": wave(3, 2)}, loss=9.0), state)
    rule.central_step(state, tally)
    assert rule.assign(state, names, {}, 3) == {"a": "shared", "b": "shared", "c": "shared+data"}
    same(state.tensors, {"w": wave(2, 2)})


def test_personal_tensors_start_from_the_runs_own() -> None:
    """Two clients that never met begin with the same personal layers, which hang on the seed alone."""
    one, two = (
        model_arrays(create_method(RunConfig(method="phoenix", seed=s)).initial((1, 8, 8), 10))
        for s in (5, 5)
    )
    assert all(np.array_equal(one[n], two[n]) for n in one)
