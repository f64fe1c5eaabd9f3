"""CFL against the authors' code, and on a tree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from espalier.methods.cfl import MEMBERSHIP
from espalier.methods.ifca import cluster
from espalier_proto import espalier_pb2 as pb
from tests.support.by_hand import (
    EDGES,
    Arrays,
    aggregate,
    method,
    on_model,
    reply_of,
    run_tree,
    same,
    server,
    small_tree,
    tapped,
    wave,
)

FIRST_GROUP = (0, 3, 4)


@pytest.mark.parametrize("linkage", ["single", "complete"])
@EDGES
def test_cfl_gives_the_numbers_of_the_authors_code(linkage: str, edges: int) -> None:
    """Cosines, norms, parting and both halves' models of `fl_devices.py`, run on the same updates.

    felisat/clustered-federated-learning@23a1c3887ed151a9c6340370337804766d11c69c. Its norms are 0.2066 of the
    mean and 2.6263 of the longest, between the thresholds 0.4 and 1.6; its linkage is "complete".
    """
    state = server({"a": wave(2, 2, 3), "b": wave(3, 2)})
    rule = method("cfl", model="mlp", cfl_from_round=1, cfl_linkage=linkage)
    rule.before_run(state, lambda *_: {})
    w = {n: a.copy() for n, a in state.section(cluster(0)).items()}
    replies = []
    for k in range(6):
        sign = 1 if k in FIRST_GROUP else -1
        change = {
            "a": sign * wave(0, 2, 3) + 0.3 * wave(20 + k, 2, 3),
            "b": sign * wave(1, 2) + 0.3 * wave(30 + k, 2),
        }
        own = {cluster(0): {n: w[n] + c for n, c in change.items()}}
        replies.append(reply_of(state, f"c{k}", own, samples=k + 1))
    aggregate(rule, state, replies, edges)
    member = {k: int(state.memory[MEMBERSHIP][f"c{k}"][0]) for k in range(6)}
    assert len({member[k] for k in FIRST_GROUP}) == len({member[k] for k in (1, 2, 5)}) == 1
    assert set(member.values()) == {0, 1}
    first = [1.4261734, 1.3646806, 0.76142293, -0.14662951, 0.50059736, 1.1388069, 1.620005, 1.1673445]
    second = [0.689865, 0.009532094, -1.1649706, -1.7481155, -1.798366, -0.3640715, 0.28871828, -0.8801813]
    for client, expected in ((0, first), (1, second)):
        model = state.section(cluster(member[client]))
        np.testing.assert_allclose(np.concatenate([model["a"].ravel(), model["b"]]), expected, atol=2e-6)


@pytest.mark.parametrize(
    "settings",
    [{"cfl_from_round": 2}, {"cfl_mean_norm": 0.2}, {"cfl_max_norm": 2.7}],
    ids=["too early", "still moving", "all short"],
)
def test_cfl_does_not_part_whom_it_should_not(settings: dict[str, Any]) -> None:
    """The same updates, with one of the three conditions missed: one cluster, which moves by the mean."""
    state = server({"a": wave(2, 2, 3), "b": wave(3, 2)})
    rule = method("cfl", model="mlp", **({"cfl_from_round": 1} | settings))
    rule.before_run(state, lambda *_: {})
    replies = []
    for k in range(6):
        sign = 1 if k in FIRST_GROUP else -1
        own = {
            "a": wave(2, 2, 3) + sign * wave(0, 2, 3) + 0.3 * wave(20 + k, 2, 3),
            "b": wave(3, 2) + sign * wave(1, 2) + 0.3 * wave(30 + k, 2),
        }
        replies.append(reply_of(state, f"c{k}", {cluster(0): own}))
    aggregate(rule, state, replies)
    assert list(state.payload) == [cluster(0)]
    model = state.section(cluster(0))
    same(model, {n: np.mean([u.sections[cluster(0)][n] for u in replies], axis=0) for n in model})


def test_cfl_separates_two_groups_on_a_tree(tmp_path: Path) -> None:
    """Opposite updates from c0, c2, c4 and c1, c3, c5, which reach different edges; the split is in round 2."""
    tree = small_tree(tmp_path, 6, reach=lambda i: (i // 3,))

    def pulled(sent: Arrays, arrays: Arrays, report: pb.ClientReport) -> Arrays:
        number = int(report.client[1:])
        sign = 1 if number % 2 else -1
        return {
            n: sent[n]
            + np.float32(0.02) * (sign * wave(i, *a.shape) + 0.3 * wave(50 + number + report.round, *a.shape))
            for i, (n, a) in enumerate(arrays.items())
        }

    calls = tapped(tree, on_model(pulled))
    thresholds = {"cfl_from_round": 2, "cfl_mean_norm": 0.5, "cfl_max_norm": 1.0}
    run = run_tree(tree, "cfl", 6, rounds=4, **thresholds)
    assert run.state is not None
    groups = [[f"c{i}" for i in (0, 2, 4)], [f"c{i}" for i in (1, 3, 5)]]
    member = {c: int(run.state.memory[MEMBERSHIP][c][0]) for group in groups for c in group}
    assert [len({member[c] for c in group}) for group in groups] == [1, 1]
    assert sorted(set(member.values())) == [0, 1]
    names = [t.name for t in run.state.architecture.tensors]
    models = [{n: calls[0].sent[n].astype(np.float64) for n in names} for _ in groups]
    for round_ in range(1, 5):
        change = {
            c.plan.client: {n: c.payload[n].astype(np.float64) - c.sent[n] for n in names}
            for c in calls
            if c.plan.round == round_
        }
        assert len(change) == 6
        for model, group in zip(models, groups, strict=True):
            together = group if round_ >= 2 else list(change)
            for n in names:
                model[n] = model[n] + np.mean([change[c][n] for c in together], axis=0)
    for model, group in zip(models, groups, strict=True):
        same(run.state.section(cluster(member[group[0]])), model, atol=3e-6)
    assert run.assessment is not None
    served = {n.label: n.clients for n in run.assessment.networks()}
    assert sorted(served.values()) == sorted(map(tuple, groups))  # type: ignore[type-var]
