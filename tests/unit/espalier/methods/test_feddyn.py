"""FedDyn: the dynamic regulariser and the servers' h."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator

from espalier.methods.feddyn import DynamicRegularizer, H
from tests.support.by_hand import (
    EDGES,
    aggregate,
    mean_kept,
    method,
    reply,
    run_tree,
    same,
    server,
    small_tree,
    tapped,
    wave,
)
from tests.support.terms import Quadratic, Vector, gradients, local_round, result, train_in_one_batch

NOTHING = torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64), Generator()


def test_the_dynamic_regulariser_and_its_recursion() -> None:
    """By hand: w = (5, 1), g_k = (2, -1), alpha = 0.5; at theta = (6, 3)."""
    model, state = Vector(5.0, 1.0), {"dyn/theta": np.array([2.0, -1.0], np.float32)}
    before = dict(state)
    term = DynamicRegularizer(0.5)
    term.begin(model, local_round(model, state=state))
    with torch.no_grad():
        model.theta.copy_(torch.tensor([6.0, 3.0]))
    # -<(6, 3), (2, -1)> + 0.25 * (1 + 4)
    assert term.loss(model, *NOTHING).item() == pytest.approx(-9 + 1.25)
    # -g_k + alpha (theta - w)
    assert gradients(term, model)["theta"].tolist() == pytest.approx([-2 + 0.5, 1 + 1.0])
    # The server reads (7, 3): g_k - 0.5 (2, 2)
    term.end(model, result(), {"theta": torch.tensor([7.0, 3.0]), "counter": torch.tensor(4.0)})
    assert state["dyn/theta"].tolist() == pytest.approx([1.0, -2.0])
    assert before["dyn/theta"].tolist() == [2.0, -1.0], "a former state was written to"
    assert set(state) == {"dyn/theta"}


def test_feddyns_fixed_point_is_the_optimum_of_the_sum() -> None:
    """Two clients of unlike optima; the server's rule by the paper, h as the mean of all g_k."""
    optima, states = [[0.0], [4.0]], [dict[str, np.ndarray](), dict[str, np.ndarray]()]
    alpha, weights, h = 0.5, 9.0, 0.0
    for number in range(1, 31):
        trained = []
        for optimum, state in zip(optima, states, strict=True):
            model = Vector(weights)
            local = local_round(model, local_epochs=30, learning_rate=0.4, state=state, round_=number)
            train_in_one_batch(model, Quadratic(optimum) + DynamicRegularizer(alpha), local)
            trained.append(model.theta.item())
        h -= alpha / 2 * sum(theta - weights for theta in trained)
        assert h == pytest.approx(np.mean([s["dyn/theta"][0] for s in states]), abs=1e-4)
        weights = float(np.mean(trained)) - h / alpha
    assert weights == pytest.approx(2.0, abs=1e-3)
    # At the optimum g_k is the gradient of the client's own loss: 2 - 0 and 2 - 4.
    assert [s["dyn/theta"][0] for s in states] == pytest.approx([2.0, -2.0], abs=1e-3)


@EDGES
def test_feddyn_adds_the_mean_of_all_states(edges: int) -> None:
    """The authors keep Σ_t (θ_k − w) per client, and send mean_S θ_k + mean over all N of it."""
    rng = np.random.default_rng(3)
    alpha, population = 0.3, 7
    shapes: dict[str, tuple[int, ...]] = {"w": (3, 2), "b": (3,)}
    state = server({n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}, (), population)
    rule = method("feddyn", dyn_alpha=alpha)
    rule.before_run(state, lambda *_: {})
    drift = {n: np.zeros((population, *s)) for n, s in shapes.items()}
    for _ in range(8):
        picked = np.flatnonzero(rng.random(population) < 0.4)
        if not len(picked):
            continue
        w = {n: state.tensors[n].copy() for n in shapes}
        own = [
            {n: w[n] + 0.3 * rng.normal(size=s).astype(np.float32) for n, s in shapes.items()} for _ in picked
        ]
        aggregate(rule, state, [reply(state, f"c{k}", a) for k, a in zip(picked, own, strict=True)], edges)
        for k, theta in zip(picked, own, strict=True):
            for n in shapes:
                drift[n][k] += theta[n] - w[n]
        expected = {n: np.mean([a[n] for a in own], axis=0) + drift[n].mean(axis=0) for n in shapes}
        same(state.tensors, expected, atol=3e-6)
        same(state.section(H), {n: -alpha * drift[n].mean(axis=0) for n in shapes})


def test_feddyn_gives_the_numbers_of_the_authors_bookkeeping() -> None:
    """Numbers of the authors' lines for `local_param_list` and `cld_mdl_param`, run on the same tensors.

    alpemreacar/FedDyn@48a19fac440ef079ce563da8e0c2896f8256fef9, utils_methods.py, train_FedDyn; clients of equal
    size, N = 5, who trained: {0,1}, {1,3,4}, {2}, {0,3}.
    """
    state = server({"w": wave(0, 4)}, (), 5)
    rule = method("feddyn", dyn_alpha=0.07)
    rule.before_run(state, lambda *_: {})
    for t, picked in enumerate([[0, 1], [1, 3, 4], [2], [0, 3]]):
        w = state.tensors["w"]
        aggregate(
            rule, state, [reply(state, f"c{c}", {"w": w + 0.1 * wave(10 + 10 * t + c, 4)}) for c in picked]
        )
    w, h = state.tensors["w"], state.section(H)["w"]
    np.testing.assert_allclose(w, [0.23559144, 0.6117266, 0.8960667, 0.6142933], atol=2e-6)
    mean = [-0.009802759, -0.01832515, 0.006259239, -0.061067663]
    np.testing.assert_allclose(-h / 0.07, mean, atol=2e-6)


@pytest.mark.parametrize(
    "settings",
    [{"rg": 1}, {"rg": 3}, {"rg": 2, "codec": "qsgd"}, {"rg": 1, "codec": "top-k"}],
    ids=["flat", "windows", "qsgd", "top-k"],
)
def test_feddyns_h_is_the_mean_of_everyones_g(settings: dict[str, Any], tmp_path: Path) -> None:
    tree = small_tree(tmp_path, 6)
    calls = tapped(tree)
    run = run_tree(tree, "feddyn", 6, rounds=6, fraction=0.4, **settings)
    assert run.state is not None
    took_part = {call.plan.client for call in calls}
    assert len(took_part) > 1
    assert len(calls) < 6 * 6
    h = run.state.section(H)
    expected = mean_kept(tmp_path, [f"c{i}" for i in range(6)], "dyn/", h)
    same(h, expected, atol=1e-7)
    assert max(float(np.abs(a).max()) for a in h.values()) > 1e-4
