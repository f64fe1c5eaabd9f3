"""DepthFL: distillation between exits, and h per tensor."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional

from espalier.methods.depthfl import ExitDistillation, consistency_weight, mutual_divergence
from espalier.methods.feddyn import H
from espalier.methods.inclusivefl import LastExit
from espalier.training.objectives import TrainingError
from tests.support.by_hand import EDGES, Arrays, aggregate, method, reply, same, server, wave
from tests.support.terms import batch, local_round, network


def test_the_ramp_of_the_distillation() -> None:
    assert consistency_weight(1) == pytest.approx(0.0067379, abs=1e-7)
    assert consistency_weight(151) == pytest.approx(math.exp(-1.25))
    assert consistency_weight(301) == consistency_weight(900) == 1.0


def test_the_divergence_of_two_exits_by_hand() -> None:
    p, q = np.array([0.75, 0.25]), np.array([0.5, 0.5])
    logits = [torch.tensor(np.log(p))[None], torch.tensor(np.log(q))[None]]
    both = float((p * np.log(p / q)).sum() + (q * np.log(q / p)).sum())
    assert mutual_divergence(logits).item() == pytest.approx(both)


def test_teachers_are_constants() -> None:
    """The gradient at z_i is softmax(z_i) - softmax(z_j), that of z_i as a pupil alone."""
    logits = [torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[0.0, 2.0, 0.5]])]
    logits = [z.requires_grad_() for z in logits]
    torch.autograd.backward(mutual_divergence(logits))
    p, q = (z.detach().softmax(1) for z in logits)
    for z, expected in zip(logits, (p - q, q - p), strict=True):
        assert z.grad is not None
        assert torch.allclose(z.grad, expected, atol=1e-6)


def distilled(round_: int, depth: int = 3, **settings: Any) -> tuple[float, list[Tensor], Tensor]:
    """Return DepthFL's loss, the exits' logits and the labels of a batch."""
    model, (images, labels) = network("depth-cnn"), batch()
    if depth < 3:
        model = type(model)(model.arguments.model_copy(update={"depth": depth}))
    term = ExitDistillation()
    term.begin(model, local_round(model, "depth-cnn", round_, **settings))
    value = term.loss(model, images, labels, Generator()).item()
    return value, [z.detach().double() for z in model.exits(images)], labels


@pytest.mark.parametrize("depth", [2, 3])
def test_depthfls_loss_against_its_formula(depth: int) -> None:
    value, logits, labels = distilled(101, depth)
    p = [z.softmax(1).numpy() for z in logits]
    expected = 0.0
    for i in range(depth):
        expected -= np.log(p[i][range(6), labels]).mean()
        for j in range(depth):
            kl = (p[j] * (np.log(p[j]) - np.log(p[i]))).sum(1).mean()
            expected += math.exp(-5 * (2 / 3) ** 2) / (depth - 1) * kl
    assert value == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_without_distillation() -> None:
    for depth, distillation in ((3, False), (1, True)):
        value, logits, labels = distilled(301, depth, distillation=distillation)
        expected = sum(functional.cross_entropy(z, labels).item() for z in logits)
        assert value == pytest.approx(expected, rel=1e-5)


def test_a_network_without_exits_is_refused() -> None:
    for term in (ExitDistillation(), LastExit()):
        with pytest.raises(TrainingError, match="depth-cnn"):
            term.begin(network("cnn"), local_round(network("cnn")))


DEPTH = {
    "stage1.weight": (2, 2),
    "stage1.bias": (2,),
    "exit1.weight": (3, 2),
    "norm2.weight": (2,),
    "norm2.running_mean": (2,),
    "exit2.weight": (3, 2),
}


HELD = {1: tuple(DEPTH)[:3], 2: tuple(DEPTH)}


ALPHA, ROUNDS = 0.1, [[(0, 1), (3, 2)], [(1, 1), (2, 1)], [(0, 1), (4, 2), (5, 2)]]


def depth_replies(w: Arrays, round_: int) -> list[tuple[str, Arrays]]:
    return [
        (
            f"c{c}",
            {n: w[n] + 0.1 * wave(10 + 10 * round_ + c + list(DEPTH).index(n), *DEPTH[n]) for n in HELD[d]},
        )
        for c, d in ROUNDS[round_]
    ]


@EDGES
def test_depthfl_has_an_h_per_tensor_of_its_holders(edges: int) -> None:
    """The reference's order: w̄ over H holders, h ← h − α (H/N)(w̄ − w), w ← w̄ − h/α; statistics without h.

    In float64, so that the two ways of adding up differ by rounding of that alone.
    """
    population = 6
    state = server(
        {n: wave(i, *s).astype(np.float64) for i, (n, s) in enumerate(DEPTH.items())},
        ["norm2.running_mean"],
        population,
    )
    rule = method("depthfl", model="depth-cnn", dyn_alpha=ALPHA)
    rule.before_run(state, lambda *_: {})
    w = {n: state.tensors[n].copy() for n in DEPTH}
    h = {n: np.zeros(s) for n, s in DEPTH.items()}
    for round_ in range(3):
        replies = depth_replies(w, round_)
        aggregate(rule, state, [reply(state, c, own, samples=5) for c, own in replies], edges)
        for name in DEPTH:
            holders = [own[name] for _, own in replies if name in own]
            if not holders:
                continue
            mean = np.mean(holders, axis=0)
            if name == "norm2.running_mean":
                w[name] = mean
                continue
            h[name] = h[name] - ALPHA * len(holders) * (mean - w[name]) / population
            w[name] = mean - h[name] / ALPHA
        same({n: state.tensors[n] for n in DEPTH}, w, atol=1e-12)
        same(state.section(H), {n: v for n, v in h.items() if n != "norm2.running_mean"}, atol=1e-12)
    assert "norm2.running_mean" not in state.section(H)


def test_depthfl_gives_the_numbers_of_its_authors_baseline() -> None:
    """Numbers of `aggregate` after three rounds, run on the same tensors.

    adap/flower@fdef7afb1dca3030553be302366cfd285ed6632c, baselines/depthfl/depthfl/strategy.py; N = 6, α = 0.1.
    """
    state = server({n: wave(i, *s) for i, (n, s) in enumerate(DEPTH.items())}, ["norm2.running_mean"], 6)
    rule = method("depthfl", model="depth-cnn", dyn_alpha=ALPHA)
    rule.before_run(state, lambda *_: {})
    for round_ in range(3):
        own = {n: state.tensors[n] for n in DEPTH}
        aggregate(rule, state, [reply(state, c, a, samples=5) for c, a in depth_replies(own, round_)])
    expected = {
        "stage1.weight": [
            [0.34671863019466403, 0.6080511599779128],
            [0.9468420341610907, 1.2580338386197878],
        ],
        "stage1.bias": [0.6663623621066413, 0.8330576797326404],
        "exit1.weight": [
            [0.8958170374234514, 0.6223226591944695],
            [-0.15917835434277855, -1.2598679915070532],
            [-0.7902880628903706, 0.171256739149491],
        ],
        "norm2.weight": [1.1270863945285479, 0.15581128050883616],
        "norm2.running_mean": [1.085355368256569, -0.5375501453876496],
        "exit2.weight": [
            [0.9738487641016641, -0.9535368204116821],
            [0.5661481221516926, 0.5143893281618754],
            [-1.1055808385213215, 0.6096900527675947],
        ],
    }
    same(state.tensors, {n: np.array(a) for n, a in expected.items()}, atol=1e-5)
