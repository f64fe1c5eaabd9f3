"""SCAFFOLD: control variates of clients and servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from espalier.methods.scaffold import CONTROL, ControlVariates
from espalier.training.objectives import Objective
from espalier_client.trainer import train_local
from tests.support.by_hand import (
    EDGES,
    aggregate,
    gradient,
    mean_kept,
    method,
    reply,
    run_tree,
    same,
    server,
    small_tree,
    tapped,
    trained,
    wave,
)
from tests.support.terms import Images, Quadratic, Vector, local_round, network, result, train_in_one_batch


def test_one_step_of_scaffold_and_its_control_variate() -> None:
    """By hand: w = (5, 1), gradient (4, -1), c = (1, 2), c_k = (0.5, -1), eta = 0.1."""
    model, state = Vector(5.0, 1.0), {"scaffold/theta": np.array([0.5, -1.0], np.float32)}
    local = local_round(model, local_steps=1, state=state)
    local.sections = {CONTROL: {"theta": np.array([1.0, 2.0], np.float32)}}
    metrics = train_in_one_batch(model, Quadratic([1.0, 2.0]) + ControlVariates(), local)
    # y = w - 0.1 (g - c_k + c) = (5, 1) - 0.1 (4.5, 2)
    assert model.theta.tolist() == pytest.approx([4.55, 0.8])
    # c_k+ = c_k - c + (w - y) / 0.1: after one step that is the gradient at w.
    assert state["scaffold/theta"].tolist() == pytest.approx([4.0, -1.0], abs=1e-5)
    assert metrics == {"lr-sum": pytest.approx(0.1)}
    assert set(state) == {"scaffold/theta"}


def test_scaffolds_variate_is_the_mean_gradient_of_all_its_steps() -> None:
    model, state = Vector(5.0), dict[str, np.ndarray]()
    local = local_round(model, local_epochs=3, learning_rate=0.5, state=state)
    metrics = train_in_one_batch(model, Quadratic([1.0]) + ControlVariates(), local)
    # Without variates yet: theta - 1 is 4, 2, 1 at the three steps.
    assert state["scaffold/theta"].tolist() == pytest.approx([7 / 3])
    assert metrics["lr-sum"] == pytest.approx(1.5)


def test_scaffold_computes_from_what_the_server_reads() -> None:
    """A codec that rounded y to (4, 1): client and server, who rebuilds the change, must agree."""
    model, state = Vector(5.0, 1.0), {"scaffold/theta": np.array([0.5, -1.0], np.float32)}
    local = local_round(model, state=state)
    local.sections = {CONTROL: {"theta": np.array([1.0, 2.0], np.float32)}}
    term = ControlVariates()
    term.begin(model, local)
    term.end(model, result(lr_sum=0.2), {"theta": torch.tensor([4.0, 1.0]), "counter": torch.tensor(9.0)})
    change = -np.array([1.0, 2.0]) + (np.array([5.0, 1.0]) - np.array([4.0, 1.0])) / 0.2
    assert state["scaffold/theta"].tolist() == pytest.approx((np.array([0.5, -1.0]) + change).tolist())


def test_control_variates_average_to_the_servers() -> None:
    """C == mean c_k over rounds in which 2 of 3 clients take part."""
    optima = [[0.0, 3.0], [4.0, -1.0], [1.0, 1.0]]
    states: list[dict[str, np.ndarray]] = [{}, {}, {}]
    weights, common = np.array([2.0, 2.0], np.float32), np.zeros(2, np.float32)
    for number, picked in enumerate([(0, 1), (1, 2), (0, 2), (0, 1)], 1):
        moves, changes = [], []
        for k in picked:
            model = Vector(*weights.tolist())
            local = local_round(model, local_steps=k + 1, state=states[k], round_=number)
            local.sections = {CONTROL: {"theta": common}}
            metrics = train_in_one_batch(model, Quadratic(optima[k]) + ControlVariates(), local)
            move = model.theta.detach().numpy() - weights
            moves.append(move)
            changes.append(-common - move / metrics["lr-sum"])
        weights = weights + np.mean(moves, 0).astype(np.float32)
        common = common + (np.sum(changes, 0) / 3).astype(np.float32)
        own = [s.get("scaffold/theta", np.zeros(2, np.float32)) for s in states]
        assert common == pytest.approx(np.mean(own, 0), abs=1e-5)


def test_one_step_of_scaffold_with_everyone_is_a_step_of_sgd() -> None:
    """With K = 1 and full participation the corrections cancel in the mean (section 10.5)."""
    optima, states = [[0.0, 3.0], [4.0, -1.0]], [dict[str, np.ndarray](), dict[str, np.ndarray]()]
    weights, common = np.array([2.0, 2.0]), np.zeros(2, np.float32)
    for number in (1, 2, 3):
        gradient = weights - np.mean(optima, 0)
        trained, changes = [], []
        for optimum, state in zip(optima, states, strict=True):
            model = Vector(*weights.tolist())
            local = local_round(model, local_steps=1, state=state, round_=number)
            local.sections = {CONTROL: {"theta": common}}
            train_in_one_batch(model, Quadratic(optimum) + ControlVariates(), local)
            trained.append(model.theta.detach().numpy())
            changes.append(-common + (weights - trained[-1]) / 0.1)
        assert np.mean(trained, 0) == pytest.approx(weights - 0.1 * gradient, abs=1e-5)
        weights, common = np.mean(trained, 0), (common + np.mean(changes, 0)).astype(np.float32)


def test_training_corrects_every_parameter() -> None:
    """A whole round of SCAFFOLD on a CNN against textbook steps computed apart."""
    model, common = network("cnn"), dict[str, np.ndarray]()
    for name, parameter in model.named_parameters():
        common[name] = np.full(parameter.shape, 0.01, np.float32)
    local = local_round(model, local_steps=1, sections={CONTROL: common}, batch_size=6)
    plain = network("cnn")
    images, labels = Images(6).images, torch.arange(6)
    torch.autograd.backward(nn.functional.cross_entropy(plain(images), labels))

    class Loss(Objective):
        def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
            return nn.functional.cross_entropy(model(images), labels)

    train_local(model, Loss() + ControlVariates(), Images(6), local, seed=1, device="cpu")
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert theirs.grad is not None
        assert torch.allclose(ours, theirs - 0.1 * (theirs.grad + 0.01), atol=1e-6), name


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
        w, c = (arrays["w"].astype(np.float64) for arrays in (state.tensors, state.section(CONTROL)))
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
                "mean": np.mean(list(statistics.values()), axis=0),
            },
            atol=3e-6,
        )
        same(state.section(CONTROL), {"w": own_c.mean(axis=0)}, atol=3e-6)


@pytest.mark.parametrize(
    "settings",
    [{"rg": 1}, {"rg": 3}, {"rg": 2, "codec": "qsgd"}, {"rg": 1, "codec": "fp16", "server_rate": 0.5}],
    ids=["flat", "windows", "qsgd", "fp16"],
)
def test_scaffolds_c_is_the_mean_of_everyones_c(settings: dict[str, Any], tmp_path: Path) -> None:
    tree = small_tree(tmp_path, 6)
    run = run_tree(tree, "scaffold", 6, rounds=6, fraction=0.4, **settings)
    assert run.state is not None
    c = run.state.section(CONTROL)
    same(c, mean_kept(tmp_path, [f"c{i}" for i in range(6)], "scaffold/", c), atol=2e-6)
    assert max(float(np.abs(a).max()) for a in c.values()) > 1e-3


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
