"""FedDiffuse: the parts that clients exchange."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from espalier.models.arrays import model_arrays
from espalier_client.state import StateStore
from tests.support.by_hand import (
    Arrays,
    Call,
    kept,
    run_tree,
    same,
    sample_mean,
    small_tree,
    tapped,
    trained,
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
    same(trained(run), {n: sample_mean(last, n) for n in trained(run)})
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
        # Names, shapes and the report are small.
        assert expected <= call.up_bytes <= expected + 20_000
    assert run.recorder.record.links["client-edge"].up_bytes == sum(call.up_bytes for call in calls)
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
