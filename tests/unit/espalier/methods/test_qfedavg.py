"""q-FedAvg against its formula and the authors' code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from espalier.methods.base import CloudState, Update
from espalier.wire.sections import MODEL
from tests.support.by_hand import (
    EDGES,
    aggregate,
    method,
    network_loss,
    reply,
    run_tree,
    same,
    server,
    small_tree,
    tapped,
    trained,
    wave,
)

LOSSES, RATE = (2.5, 0.4, 1.1), 0.1


def fair_replies(state: CloudState, rate: float = RATE) -> list[Update]:
    return [
        reply(
            state,
            f"c{k}",
            {"a": wave(10 + 10 * k, 2, 3), "b": wave(11 + 10 * k, 2)},
            samples=5 * k + 1,
            received_loss=loss,
            lr_sum=3 * rate,
            steps=3,
        )
        for k, loss in enumerate(LOSSES)
    ]


@EDGES
@pytest.mark.parametrize("q", [0.0, 0.5, 1.0, 5.0])
def test_qfedavg_is_its_formula_written_out(q: float, edges: int) -> None:
    """W ← w − ΣΔ_k / Σh_k, Δ_k = F^q L (w − y), h_k = q F^{q−1} ‖L (w − y)‖² + L F^q; in float64."""
    state = server({"a": wave(0, 2, 3), "b": wave(1, 2)})
    w = {n: a.astype(np.float64) for n, a in state.tensors.items()}
    replies, lipschitz = fair_replies(state), 1 / RATE
    numerator, denominator = {n: np.zeros_like(a) for n, a in w.items()}, 0.0
    for update, loss in zip(replies, LOSSES, strict=True):
        step = {n: lipschitz * (w[n] - update.sections[MODEL][n].astype(np.float64)) for n in w}
        square = sum(float((s**2).sum()) for s in step.values())
        for n in w:
            numerator[n] += loss**q * step[n]
        denominator += q * loss ** (q - 1) * square + lipschitz * loss**q
    aggregate(method("qfedavg", model="mlp", fairness_q=q), state, replies, edges)
    same(state.tensors, {n: w[n] - numerator[n] / denominator for n in w})
    if q == 0:
        same(state.tensors, {n: np.mean([u.sections[MODEL][n] for u in replies], axis=0) for n in w})


@pytest.mark.parametrize(
    ("q", "expected"),
    [
        (
            0.0,
            [
                -0.23124879598617554,
                0.10460086166858673,
                -0.3901066184043882,
                0.025350183248519897,
                0.8763121167818705,
                -0.1539504031340282,
                -0.22263894478480017,
                -0.3387190103530884,
            ],
        ),
        (
            1.0,
            [
                0.3484191890635641,
                0.6705994819607124,
                0.8803643912086929,
                0.9813776124472224,
                0.9606333609578671,
                0.7803562009975141,
                0.6564273372940526,
                0.9827868734430122,
            ],
        ),
        (
            5.0,
            [
                0.35615929223055465,
                0.6754895697530521,
                0.8898999666035736,
                0.988785724573401,
                0.961423927268482,
                0.7897920006333237,
                0.6666333178955979,
                0.9935255326788441,
            ],
        ),
    ],
)
def test_qfedavg_gives_the_numbers_of_the_authors_code(q: float, expected: list[float]) -> None:
    """Numbers of `aggregate2` with Δ_k and h_k of `qffedavg.py`, run on the same tensors.

    litian96/fair_flearn@f09797113147b5ae66eb0348e93f575d5d63baed, flearn/trainers/fedbase.py; learning rate 0.1.
    """
    state = server({"a": wave(0, 2, 3), "b": wave(1, 2)})
    aggregate(method("qfedavg", model="mlp", fairness_q=q), state, fair_replies(state))
    found = np.concatenate([state.tensors[n].ravel() for n in ("a", "b")])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_qfedavg_leaves_statistics_and_counters_to_the_mean() -> None:
    """Fair steps are of trained tensors; a counter stays whole (stock QFedAvg crashes on it)."""
    before = {"w": wave(0, 2), "mean": wave(1, 2), "count": np.array(3)}
    state = server(before, ["mean", "count"])
    replies = [
        reply(
            state,
            f"c{k}",
            {"w": wave(2 + k, 2), "mean": wave(4 + k, 2), "count": np.array(5 + k)},
            received_loss=loss,
            lr_sum=0.1,
            steps=1,
        )
        for k, loss in enumerate((1.0, 1.0))
    ]
    aggregate(method("qfedavg", fairness_q=0.0), state, replies)
    assert state.tensors["count"].dtype == np.int64
    assert int(state.tensors["count"]) == 6
    same(state.tensors, {"mean": (wave(4, 2) + wave(5, 2)) / 2})
    with pytest.raises(ValueError, match="its loss at the received model is 0"):
        aggregate(method("qfedavg"), state, [reply(state, "c", before, lr_sum=0.1, steps=1)])


def test_qfedavg_on_a_tree(tmp_path: Path) -> None:
    tree = small_tree(tmp_path, 3, data="digits:{i}/{of}:dirichlet=0.3")
    calls = tapped(tree)
    run = run_tree(tree, "qfedavg", 3, rounds=1, fairness_q=2.0, learning_rate=0.1, clip_norm=0.0)
    assert run.state is not None
    # Clients are drawn with replacement, so two or three of the three train.
    top, bottom = {n: np.zeros(a.shape) for n, a in trained(run).items()}, 0.0
    assert len(calls) >= 2
    for call in calls:
        data = f"digits:{call.plan.client[1:]}/30:dirichlet=0.3"
        with torch.no_grad():
            loss = float(network_loss(run.state.architecture, call.sent, data))
        assert call.report.metrics["received-loss"] == pytest.approx(loss, rel=1e-5)
        step = {n: 10 * (call.sent[n].astype(np.float64) - call.payload[n]) for n in top}
        square = sum(float((s**2).sum()) for s in step.values())
        for n in top:
            top[n] = top[n] + loss**2 * step[n]
        bottom += 2 * loss * square + 10 * loss**2
    same(trained(run), {n: calls[0].sent[n] - top[n] / bottom for n in top})
