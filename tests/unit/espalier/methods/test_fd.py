"""FD: distillation from soft labels and the clients' tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from espalier.methods.fd import STATE, SoftLabelDistillation
from espalier.tasks.classification import CrossEntropy
from espalier.wire.class_table import (
    COUNT,
    MEAN,
    REPLY,
    ROUND,
    SOFT_LABEL,
    TABLE,
    VECTORS,
    ClassTable,
    given_arrays,
    merge,
)
from espalier_client.trainer import train_local
from tests.support.terms import Images, added_loss, batch, local_round, moved, network, result

CLASSES = 10


def soft(labels: list[int], seed: int = 0) -> ClassTable:
    vectors = np.random.default_rng(seed).dirichlet(np.ones(CLASSES), len(labels))
    return ClassTable.of(SOFT_LABEL, CLASSES, labels, vectors)


def test_no_soft_labels_no_term() -> None:
    model = network("cnn")
    term = SoftLabelDistillation(2.0)
    term.begin(model, local_round(model))
    assert added_loss(term, model) == 0.0
    assert term.end(model, result(), {}) == {}


def test_the_soft_label_term_by_its_formula() -> None:
    model = network("cnn")
    mine, other, third = soft([0, 1, 2], 1), soft([0, 1, 4], 2), soft([0, 5], 3)
    state = {STATE + name: array for name, array in given_arrays(mine, 3).items()}
    local = local_round(
        model, round_=4, sections={TABLE: given_arrays(merge([mine, other, third]), 3)}, state=state
    )
    term = SoftLabelDistillation(1.5)
    term.begin(model, local)
    # The batch has one image each of the classes 0 to 5: class 2 is mine alone, class 3 nobody's.
    targets = {
        0: (other.vectors[0] + third.vectors[0]) / 2,
        1: other.vectors[1],
        4: other.vectors[2],
        5: third.vectors[1],
    }
    outputs = model(batch()[0]).double().softmax(1).detach().numpy()
    by_hand = -sum(float(q @ np.log(outputs[label])) for label, q in targets.items()) / 6
    found = added_loss(term, model)
    assert found == pytest.approx(1.5 * by_hand, rel=1e-5)
    assert term.end(model, result(), {})["soft-label-loss"] == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("kept_round", [2, None])
def test_who_sat_out_takes_nothing_out(kept_round: int | None) -> None:
    model, given = network("cnn"), soft(list(range(CLASSES)), 2)
    state = {}
    if kept_round is not None:
        state = {STATE + n: a for n, a in given_arrays(soft([0, 1], 1), kept_round).items()}
    term = SoftLabelDistillation(1.0)
    term.begin(model, local_round(model, round_=4, sections={TABLE: given_arrays(given, 3)}, state=state))
    outputs = model(batch()[0]).double().softmax(1).detach().numpy()
    by_hand = -sum(float(given.vectors[y] @ np.log(outputs[y])) for y in range(6)) / 6
    assert added_loss(term, model) == pytest.approx(by_hand, rel=1e-5)


def test_the_local_table_is_the_mean_output_by_label() -> None:
    model = network("cnn")
    term, local = SoftLabelDistillation(1.0), local_round(model)
    objective = CrossEntropy() + term
    objective.begin(model, local)
    seen: dict[int, list[Tensor]] = {}
    for step in range(3):
        images, labels = batch(4 + step)
        with torch.no_grad():
            for label, output in zip(labels.tolist(), model(images).softmax(1), strict=True):
                seen.setdefault(label, []).append(output)
        model.zero_grad()
        torch.autograd.backward(objective.loss(model, images, labels, Generator()))
        moved(model, 0.05, step)
    table = term.table()
    table.validate("c", kind=SOFT_LABEL, classes=CLASSES)
    assert table.labels.tolist() == list(range(6))
    assert table.counts.tolist() == [1.0] * 6
    for label, vector in zip(table.labels, table.vectors, strict=True):
        np.testing.assert_allclose(vector, torch.stack(seen[int(label)]).mean(0), atol=1e-6)
    np.testing.assert_array_equal(objective.extra()[REPLY][VECTORS], table.vectors)
    objective.end(model, result(), {})
    assert int(local.state[STATE + ROUND]) == 1
    np.testing.assert_array_equal(local.state[STATE + MEAN][:6], table.vectors)
    assert local.state[STATE + COUNT].tolist() == [1.0] * 6 + [0.0] * 4


def test_measuring_adds_nothing_to_the_table() -> None:
    model = network("cnn")
    term = SoftLabelDistillation(1.0)
    objective = CrossEntropy() + term
    objective.begin(model, local_round(model))
    with torch.no_grad():
        objective.loss(model, *batch(), Generator())
    assert len(term.table()) == 0


def test_distillation_stays_finite_for_200_rounds() -> None:
    """Two clients of unlike architectures, raw SGD without clipping: losses stay bounded, unlike with raw logits."""
    presets = ("mlp", "cnn")
    models = [network(preset, seed=place) for place, preset in enumerate(presets)]
    states: list[dict[str, np.ndarray]] = [{} for _ in models]
    aux: dict[str, np.ndarray] = {}
    images = [Images(6 + place) for place in range(len(models))]
    losses = []
    for round_ in range(1, 201):
        tables = []
        for place, (model, preset) in enumerate(zip(models, presets, strict=True)):
            local = local_round(
                model, preset, round_, sections={TABLE: aux}, state=states[place], keep_optimizer=False
            )
            term = SoftLabelDistillation(1.0)
            objective = CrossEntropy() + term
            outcome = train_local(model, objective, images[place], local, seed=round_, device="cpu")
            tables.append(term.table().validate("c", kind=SOFT_LABEL, classes=CLASSES))
            objective.end(model, outcome, {})
            losses.append(outcome.loss)
        aux = given_arrays(merge(tables), round_)
    assert np.isfinite(losses).all()
    assert min(losses) >= 0
    # It learns its few images by heart: the last loss is far below the first, log 10 at the start.
    assert losses[-1] < 0.7 < 2.0 < losses[0]
