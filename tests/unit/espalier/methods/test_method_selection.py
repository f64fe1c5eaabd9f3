"""Methods that choose clients, on whole trees: who trains is who should, by losses and gradients computed here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from espalier.data.spec import open_data
from espalier.methods.divfl import cost, distances, greedy, lazy_greedy
from espalier.methods.state import build_model
from espalier.wire.payload import Weights
from espalier_proto import espalier_pb2 as pb
from tests.support.by_hand import Arrays, Call, run_tree, same, small_tree, tapped, wave

SPEC = "digits:{i}/{of}:pathological=2"


def measured(architecture: pb.ArchitectureSpec, arrays: Arrays, client: str) -> tuple[float, np.ndarray]:
    """Return F_k(w) over all of a client's images and its gradient as one vector, by plain torch."""
    own = {t.name: np.array(arrays[t.name]) for t in architecture.tensors}
    model = build_model(architecture, Weights.pack(own)).eval()
    images = open_data(SPEC.format(i=client[1:], of=30))
    logits = model(images.fetch(np.arange(len(images))))
    loss = functional.cross_entropy(logits, torch.from_numpy(np.asarray(images.labels)))
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return float(loss.detach()), gradient.numpy().astype(np.float64)


def in_round(calls: list[Call], round_: int, trains: bool) -> list[Call]:
    return [c for c in calls if c.plan.round == round_ and c.trains == trains]


def test_power_of_choice_trains_the_clients_of_largest_loss(tmp_path: Path) -> None:
    """With everyone a candidate the m of largest F_k(w) train, and the model becomes their plain mean."""
    tree = small_tree(tmp_path, 6, data=SPEC)
    calls = tapped(tree)
    run = run_tree(tree, "power-of-choice", 6, rounds=4, fraction=0.34, candidates=6, local_epochs=3)
    assert run.state is not None
    picks = []
    for round_ in range(1, 5):
        asked, picked = in_round(calls, round_, trains=False), in_round(calls, round_, trains=True)
        assert sorted(c.plan.client for c in asked) == [f"c{i}" for i in range(6)]
        losses = {c.plan.client: measured(run.state.architecture, c.sent, c.plan.client)[0] for c in asked}
        for call in asked:
            assert call.report.loss == pytest.approx(losses[call.plan.client], rel=1e-5)
        expected = sorted(losses, key=lambda c: -losses[c])[:2]
        assert sorted(c.plan.client for c in picked) == sorted(expected)
        picks.append(sorted(expected))
    assert len({tuple(p) for p in picks}) > 1
    last = in_round(calls, 4, trains=True)
    names = [t.name for t in run.state.architecture.tensors]
    same(run.state.tensors, {n: np.mean([c.payload[n] for c in last], axis=0) for n in names})


def test_in_a_windows_later_rounds_edges_choose_by_their_own_model(tmp_path: Path) -> None:
    """Rg = 2: three of c0 … c3 and one of c4, c5 would be kept by shares m·d_e/d of m = 3 over 4 and 2: 2 and 1."""
    tree = small_tree(tmp_path, 6, data=SPEC, reach=lambda i: (int(i > 3),))
    calls = tapped(tree)
    run = run_tree(tree, "power-of-choice", 6, rounds=4, rg=2, fraction=0.5, candidates=6, local_epochs=3)
    assert run.state is not None
    for round_ in range(1, 5):
        asked, picked = in_round(calls, round_, trains=False), in_round(calls, round_, trains=True)
        losses = {c.plan.client: measured(run.state.architecture, c.sent, c.plan.client)[0] for c in asked}
        assert len(losses) == 6
        edges = {c.plan.client: c.plan.edge for c in asked}
        if round_ % 2:  # The window's first round: the cloud asks about the global model and ranks everyone.
            expected = sorted(losses, key=lambda c: -losses[c])[:3]
        else:
            expected = []
            for edge, keep in (("edge-1", 2), ("edge-2", 1)):
                own = [c for c in losses if edges[c] == edge]
                expected += sorted(own, key=lambda c: -losses[c])[:keep]
            # Each edge asks about what it sends to those who train, its own model.
            for call in picked:
                probe = next(c for c in asked if c.plan.client == call.plan.client)
                assert all(np.array_equal(probe.sent[n], a) for n, a in call.sent.items())
        assert sorted(c.plan.client for c in picked) == sorted(expected)
    first, second = ({c.plan.edge: c.sent for c in in_round(calls, r, trains=True)} for r in (1, 2))
    moved = [
        not np.array_equal(second[e]["hidden1.weight"], first[e]["hidden1.weight"])
        for e in second
        if e in first
    ]
    assert any(moved)


def test_candidates_are_fewer_than_everyone(tmp_path: Path) -> None:
    tree = small_tree(tmp_path, 6, data=SPEC)
    calls = tapped(tree)
    run = run_tree(tree, "power-of-choice", 6, rounds=3, fraction=0.34, candidates=3)
    assert run.state is not None
    for round_ in (1, 2, 3):
        asked, picked = in_round(calls, round_, trains=False), in_round(calls, round_, trains=True)
        assert len(asked) == 3
        losses = {c.plan.client: measured(run.state.architecture, c.sent, c.plan.client)[0] for c in asked}
        assert sorted(c.plan.client for c in picked) == sorted(sorted(losses, key=lambda c: -losses[c])[:2])


def test_remembered_losses_ask_nobody(tmp_path: Path) -> None:
    """rpow-d: who never trained comes first; later the largest mean training loss of the last participation."""
    tree = small_tree(tmp_path, 4, data=SPEC)
    calls = tapped(tree)
    run_tree(tree, "power-of-choice", 4, selection="rpow-d", rounds=5, fraction=0.5, candidates=4)
    assert all(c.trains for c in calls)
    remembered: dict[str, float] = {}
    for round_ in range(1, 6):
        picked = in_round(calls, round_, trains=True)
        names = sorted(c.plan.client for c in picked)
        if round_ == 1:
            assert len(names) == 2
        elif round_ == 2:
            assert not set(names) & set(remembered)
        else:
            assert names == sorted(sorted(remembered, key=lambda c: -remembered[c])[:2])
        remembered |= {c.plan.client: c.report.loss for c in picked}
    assert len(remembered) == 4


def test_divfl_on_a_tree_chooses_by_the_clients_gradients(tmp_path: Path) -> None:
    """With fresh gradients of everyone; the two chosen one after the other lower G(S) most."""
    tree = small_tree(tmp_path, 6, data=SPEC)
    calls = tapped(tree)
    settings: dict[str, Any] = {"divfl_gradients": "ideal", "divfl_greedy": "greedy"}
    run = run_tree(tree, "divfl", 6, rounds=2, fraction=0.34, **settings)
    assert run.state is not None
    for round_ in (1, 2):
        asked, picked = in_round(calls, round_, trains=False), in_round(calls, round_, trains=True)
        names = sorted(c.plan.client for c in asked)
        assert names == [f"c{i}" for i in range(6)]
        sent = {c.plan.client: c.sent for c in asked}
        found = [measured(run.state.architecture, sent[n], n)[1] for n in names]
        table = np.array([[np.linalg.norm(a - b) for b in found] for a in found])
        first = int(np.argmin(table.sum(axis=0)))
        totals = [np.minimum(table[:, first], table[:, j]).sum() if j != first else np.inf for j in range(6)]
        expected = {names[first], names[int(np.argmin(totals))]}
        assert {c.plan.client for c in picked} == expected


@pytest.mark.parametrize(
    ("clients", "count", "chosen"), [(8, 3, [1, 4, 7]), (12, 4, [1, 4, 7, 8]), (20, 6, [0, 1, 2, 6, 8, 16])]
)
def test_divfls_greedy_gives_the_choices_of_the_authors_code(
    clients: int, count: int, chosen: list[int]
) -> None:
    """Choices of `greedy` and `lazy_greedy`, run on the same gradients, of which the third case has ties.

    melodi-lab/divfl@4a5b80df85a72b97751ce1130ee5c7d76a2c1540, flearn/trainers/fedbase.py. Its lazy variant
    settles the ties of 20 clients otherwise: [1, 2, 7, 9, 16, 17].
    """
    table = distances(np.stack([wave(k, 5) for k in range(clients)]))
    assert sorted(greedy(table, count)) == chosen
    assert sorted(lazy_greedy(table, count)) == chosen
    if clients == 20:
        assert cost(table, chosen) == pytest.approx(cost(table, [1, 2, 7, 9, 16, 17]), rel=1e-12)
