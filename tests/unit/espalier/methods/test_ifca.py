"""IFCA: averages per cluster, and recovered groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from espalier.methods.ifca import cluster
from espalier.wire.sections import MODEL
from tests.support.by_hand import (
    EDGES,
    aggregate,
    method,
    network_loss,
    reply_of,
    run_tree,
    same,
    server,
    small_tree,
    tapped,
    wave,
)


@EDGES
def test_ifca_averages_by_cluster_and_shared_layers_over_all(edges: int) -> None:
    """Nobody picked model 2: it stays bit for bit."""
    shapes = {"body.weight": (3, 2), "classifier.weight": (2, 3)}
    start = {cluster(j): {"classifier.weight": wave(1 + j, 2, 3)} for j in range(3)}
    state = server({"body.weight": wave(0, 3, 2)})
    state.put(start)
    rule = method("ifca", model="mlp", clusters=3, shared_layers="body")
    picks, samples = [0, 1, 0, 0, 1], [10, 40, 30, 5, 8]
    replies = []
    for k, (j, n) in enumerate(zip(picks, samples, strict=True)):
        shared, picked = {"body.weight": wave(20 + k, 3, 2)}, {"classifier.weight": wave(30 + k, 2, 3)}
        assert {name: a.shape for name, a in (shared | picked).items()} == shapes
        replies.append(reply_of(state, f"c{k}", {MODEL: shared, cluster(j): picked}, samples=n, cluster=j))
    aggregate(rule, state, replies, edges)
    total = sum(samples)
    body = np.sum([n / total * wave(20 + k, 3, 2) for k, n in enumerate(samples)], axis=0)
    same(state.tensors, {"body.weight": body})
    for j in (0, 1):
        members = [k for k, number in enumerate(picks) if number == j]
        size = sum(samples[k] for k in members)
        mean = np.sum([samples[k] / size * wave(30 + k, 2, 3) for k in members], axis=0)
        same(state.section(cluster(j)), {"classifier.weight": mean})
    untouched = state.section(cluster(2))["classifier.weight"]
    assert untouched.tobytes() == start[cluster(2)]["classifier.weight"].tobytes()


@pytest.mark.parametrize("shared", ["", "hidden1"])
def test_ifca_recovers_rotated_groups_on_a_tree(shared: str, tmp_path: Path) -> None:
    """Odd clients' digits stand on their head: the two models part them, and each client is at its own."""
    spec = "digits:{i}/{of}:iid+rotate=2"
    tree = small_tree(tmp_path, 6, of=12, data=spec, reach=lambda i: (i // 3,))
    calls = tapped(tree)
    run = run_tree(
        tree, "ifca", 6, rounds=6, local_epochs=4, batch_size=16, learning_rate=0.1, shared_layers=shared
    )
    assert run.state is not None
    names = [t.name for t in run.state.architecture.tensors]
    for call in (c for c in calls if c.trains):
        losses = [
            float(
                network_loss(
                    run.state.architecture,
                    {n: (call.sent | call.sent_sections[cluster(j)])[n] for n in names},
                    spec.format(i=call.plan.client[1:], of=12),
                ).detach()
            )
            for j in range(2)
        ]
        # The picked model has the smaller loss on all of the client's images, and only it comes back.
        assert int(call.report.metrics["cluster"]) == int(np.argmin(losses))
        assert set(call.sections) - {MODEL} == {cluster(int(np.argmin(losses)))}
        assert set(call.payload) == {n for n in names if shared and n.startswith(shared)}
    last = {c.plan.client: int(c.report.metrics["cluster"]) for c in calls if c.trains and c.plan.round == 6}
    groups = [{last[f"c{i}"] for i in parity} for parity in ((0, 2, 4), (1, 3, 5))]
    assert sorted(map(sorted, groups)) == [[0], [1]]


def test_ifca_keeps_a_model_without_members(tmp_path: Path) -> None:
    """On a tree: with three models and clients that are alike, one at least is picked by nobody."""
    tree = small_tree(tmp_path, 2)
    calls = tapped(tree)
    run = run_tree(tree, "ifca", 2, rounds=2, clusters=3)
    assert run.state is not None
    picked = {int(c.report.metrics["cluster"]) for c in calls if c.trains}
    alone = set(range(3)) - picked
    assert alone
    first = next(c for c in calls if c.trains)
    for j in range(3):
        section = run.state.section(cluster(j))
        kept = [np.array_equal(a, first.sent_sections[cluster(j)][n]) for n, a in section.items()]
        assert all(kept) if j in alone else not any(kept)
