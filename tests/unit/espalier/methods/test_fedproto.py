"""FedProto: the prototype term and the clients' tables."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Generator

from espalier.methods.fedproto import PrototypeTerm
from espalier.models.layers import SingleHead
from espalier.tasks.classification import CrossEntropy
from espalier.training.objectives import TrainingError
from espalier.wire.class_table import (
    PROTOTYPE,
    TABLE,
    ClassTable,
    given_arrays,
)
from tests.support.terms import (
    Images,
    added_loss,
    batch,
    gradients,
    local_round,
    moved,
    network,
    received,
    result,
)

CLASSES = 10


def prototypes(model: SingleHead, labels: list[int]) -> ClassTable:
    width = model.classifier.in_features
    vectors = np.random.default_rng(5).normal(size=(len(labels), width))
    return ClassTable.of(PROTOTYPE, CLASSES, labels, vectors)


def test_the_prototype_term_by_its_formula() -> None:
    model = network("cnn")
    given = prototypes(model, [0, 3, 9])
    term = PrototypeTerm(4.0)
    term.begin(model, local_round(model, sections={TABLE: given_arrays(given, 0)}))
    features = model.features(batch()[0]).detach().double().numpy()
    squares = [((features[y] - given.vectors[row]) ** 2).mean() for row, y in enumerate((0, 3))]
    assert added_loss(term, model) == pytest.approx(4.0 * sum(squares) / 6, rel=1e-5)
    assert term.end(model, result(), {})["prototype-loss"] == pytest.approx(sum(squares) / 6, rel=1e-5)


def test_prototypes_reach_features_but_not_the_output_layer() -> None:
    model = network("cnn")
    alone = gradients(CrossEntropy(), model)
    objective = CrossEntropy() + PrototypeTerm(1.0)
    objective.begin(
        model, local_round(model, sections={TABLE: given_arrays(prototypes(model, [0, 1, 2]), 0)})
    )
    found = gradients(objective, model)
    assert torch.equal(found["classifier.weight"], alone["classifier.weight"])
    assert not torch.allclose(found["conv1.weight"], alone["conv1.weight"])


def test_local_prototypes_are_mean_features_in_eval_mode() -> None:
    data = Images(23)
    model = moved(network("cnn-bn"), 0.05).train()
    term = PrototypeTerm(1.0)
    objective = CrossEntropy() + term
    objective.begin(model, local_round(model, "cnn-bn", data=data, batch_size=5))
    before = received(model)
    table = term.table()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    judge = copy.deepcopy(model).eval()
    with torch.no_grad():
        features = judge.features(data.images).numpy()  # type: ignore[operator]
    for label, vector in zip(table.labels, table.vectors, strict=True):
        np.testing.assert_allclose(vector, features[data.labels == label].mean(0), atol=1e-5)
    table.validate("c", kind=PROTOTYPE, classes=CLASSES, dimension=features.shape[1])


def test_prototypes_of_another_width_are_refused() -> None:
    model = network("cnn")
    wrong = ClassTable.of(PROTOTYPE, CLASSES, [0], np.zeros((1, 3)))
    objective = CrossEntropy() + PrototypeTerm(1.0)
    objective.begin(model, local_round(model, sections={TABLE: given_arrays(wrong, 0)}))
    with pytest.raises(TrainingError, match="prototypes 3"):
        objective.loss(model, *batch(), Generator())
