"""FedDyn and SCAFFOLD, client part and servers together: their invariants on whole trees, and their formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from espalier.data.spec import open_data
from espalier.methods.state import build_model
from espalier_proto import espalier_pb2 as pb
from espalier_server.run import TreeRun
from tests.support.by_hand import network_loss, loaded, gradient, trained, EDGES
from tests.support.by_hand import (
    Arrays,
    aggregate,
    kept,
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







# --- FedDyn -----------------------------------------------------------------------------------------


@EDGES
def test_feddyn_is_the_mean_of_those_who_trained_plus_the_mean_of_what_all_keep(edges: int) -> None:
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
        same(state.section("dyn"), {n: -alpha * drift[n].mean(axis=0) for n in shapes})


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
    w, h = state.tensors["w"], state.tensors["dyn/w"]
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
    h = run.state.section("dyn")
    expected = mean_kept(tmp_path, [f"c{i}" for i in range(6)], "dyn/", h)
    same(h, expected, atol=1e-7)
    assert max(float(np.abs(a).max()) for a in h.values()) > 1e-4


# --- SCAFFOLD ---------------------------------------------------------------------------------------


@EDGES
def test_scaffolds_step_is_algorithm_1(edges: int) -> None:
    """W ← w + η_g mean_S Δ_k, c ← c + (1/N) Σ_S Δc_k with Δc_k = −c + (w − y_k)/(Kη); statistics by the mean."""
    rng = np.random.default_rng(4)
    population, server_rate = 5, 0.7
    state = server({"w": wave(0, 3, 2), "mean": wave(1, 2)}, ["mean"], population)
    rule = method("scaffold", server_rate=server_rate)
    rule.before_run(state, lambda *_: {})
    own_c = np.zeros((population, 3, 2))
    for picked in ([0, 1, 4], [2], [1, 2, 3, 4]):
        w, c = (state.tensors[n].astype(np.float64) for n in ("w", "control/w"))
        y = {k: (w + 0.2 * rng.normal(size=(3, 2))).astype(np.float32) for k in picked}
        step = {k: 0.05 * (k + 2) for k in picked}  # K η differs from client to client
        statistics = {k: wave(10 + k, 2) for k in picked}
        replies = [
            reply(state, f"c{k}", {"w": y[k], "mean": statistics[k]}, samples=k + 1, lr_sum=step[k])
            for k in picked
        ]
        aggregate(rule, state, replies, edges)
        for k in picked:
            own_c[k] = own_c[k] - c + (w - y[k]) / step[k]
        same(
            state.tensors,
            {
                "w": w + server_rate * np.mean([y[k] - w for k in picked], axis=0),
                "control/w": own_c.mean(axis=0),
                "mean": np.mean(list(statistics.values()), axis=0),
            },
            atol=3e-6,
        )


@pytest.mark.parametrize(
    "settings",
    [{"rg": 1}, {"rg": 3}, {"rg": 2, "codec": "qsgd"}, {"rg": 1, "codec": "fp16", "server_rate": 0.5}],
    ids=["flat", "windows", "qsgd", "fp16"],
)
def test_scaffolds_c_is_the_mean_of_everyones_c(settings: dict[str, Any], tmp_path: Path) -> None:
    tree = small_tree(tmp_path, 6)
    run = run_tree(tree, "scaffold", 6, rounds=6, fraction=0.4, **settings)
    assert run.state is not None
    c = run.state.section("control")
    same(c, mean_kept(tmp_path, [f"c{i}" for i in range(6)], "scaffold/", c), atol=2e-6)
    assert max(float(np.abs(a).max()) for a in c.values()) > 1e-3


@pytest.mark.parametrize(
    ("name", "section", "prefix"), [("scaffold", "control", "scaffold/"), ("feddyn", "dyn", "dyn/")]
)
def test_clients_that_join_late_count_as_zeros(
    name: str, section: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = small_tree(tmp_path, 6)
    late = [node for below in tree.edges for node in below if node.config["name"] in ("c4", "c5")]
    for node in late:
        node.online = False
    populations: list[int] = []
    window = TreeRun._window

    def and_then_they_come(self: TreeRun, *args: Any) -> None:
        window(self, *args)
        populations.append(args[1].population)
        for node in late if len(populations) == 2 else []:
            node.online = True

    monkeypatch.setattr(TreeRun, "_window", and_then_they_come)
    run = run_tree(tree, name, 4, rounds=12, rg=2, fraction=0.5)
    assert run.state is not None
    assert populations[:2] == [4, 4]
    assert populations[-1] == 6
    assert kept(tmp_path, "c4") or kept(tmp_path, "c5")
    found = run.state.section(section)
    same(found, mean_kept(tmp_path, [f"c{i}" for i in range(6)], prefix, found), atol=2e-6)


def test_a_round_below_quorum_leaves_no_trace_at_its_clients(tmp_path: Path) -> None:
    """c2, alone at its edge, trains in vain every time: always from the start, and c counts it as zero."""
    tree = small_tree(tmp_path, 3, reach=lambda i: (i // 2,))
    calls = tapped(tree)
    run = run_tree(tree, "scaffold", 3, rounds=4, rg=2, quorum=2)
    assert run.state is not None
    starts = {
        c: [(x.plan.start.window, x.plan.start.round) for x in calls if x.plan.client == c]
        for c in ("c0", "c2")
    }
    assert starts == {"c0": [(0, 0), (1, 1), (1, 2), (2, 3)], "c2": [(0, 0)] * 4}
    assert [(f.node, f.kind) for f in run.chronicle.record.faults] == [("edge-2", "quorum")] * 4
    c = run.state.section("control")
    of_two = mean_kept(tmp_path, ["c0", "c1"], "scaffold/", c)
    same(c, {n: a * 2 / 3 for n, a in of_two.items()}, atol=2e-6)


def test_one_step_of_everyone_is_sgd_with_both_rates(tmp_path: Path) -> None:
    """K = 1 and full participation: the corrections cancel, so w moves by −η η_g · mean_k ∇F_k(w)."""
    tree, rate, server_rate = small_tree(tmp_path, 3), 0.2, 0.5
    initial = tapped(tree)
    run = run_tree(
        tree,
        "scaffold",
        3,
        rounds=4,
        local_steps=1,
        batch_size=100,
        learning_rate=rate,
        server_rate=server_rate,
        clip_norm=0.0,
    )
    assert run.state is not None
    w = {n: initial[0].sent[n].astype(np.float64) for n in trained(run)}
    for _ in range(4):
        gradients = [
            gradient(
                run.state.architecture, {n: a.astype(np.float32) for n, a in w.items()}, f"digits:{i}/30"
            )
            for i in range(3)
        ]
        w = {n: a - rate * server_rate * np.mean([g[n] for g in gradients], axis=0) for n, a in w.items()}
    same(trained(run), w, atol=2e-6)
    moved = max(float(np.abs(w[n] - initial[0].sent[n]).max()) for n in w)
    assert moved > 1e-3
