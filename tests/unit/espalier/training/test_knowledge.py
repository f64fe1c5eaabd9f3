"""Soft labels, prototypes and peers: clients that learn from each other's classes and predictions."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from espalier.config.run_config import RunConfig
from espalier.errors import WireError
from espalier.methods.codistillation import PeerDistillation
from espalier.methods.fd import STATE, SoftLabelDistillation
from espalier.methods.fedproto import PrototypeTerm
from espalier.models.architecture import describe
from espalier.models.arrays import model_arrays
from espalier.models.initial import initial_bases
from espalier.models.layers import SingleHead
from espalier.tasks.classification import CrossEntropy
from espalier.training.objectives import Objective, TrainingError
from espalier.training.trainer import train_local
from espalier.wire.class_table import (
    COUNT,
    MEAN,
    PROTOTYPE,
    ROUND,
    SOFT_LABEL,
    VECTORS,
    ClassTable,
    given_arrays,
    merge,
)
from tests.support.terms import Images, batch, gradients, local_round, moved, network, received, result

CLASSES = 10


def soft(labels: list[int], seed: int = 0) -> ClassTable:
    vectors = np.random.default_rng(seed).dirichlet(np.ones(CLASSES), len(labels))
    return ClassTable.of(SOFT_LABEL, CLASSES, labels, vectors)


def value(term: Objective, model: Any, seed: int = 0) -> float:
    """Return base loss and term on the usual batch, minus the base loss."""
    images, labels = batch()
    whole = (CrossEntropy() + term).loss(model, images, labels, Generator().manual_seed(seed)).item()
    with torch.no_grad():
        return whole - functional.cross_entropy(model(images), labels).item()


# --- FD --------------------------------------------------------------------------------------------


def test_no_soft_labels_no_term() -> None:
    model = network("cnn")
    term = SoftLabelDistillation(2.0)
    term.begin(model, local_round(model))
    assert value(term, model) == 0.0
    assert term.end(model, result(), {}) == {}


def test_the_soft_label_term_by_its_formula() -> None:
    model = network("cnn")
    mine, other, third = soft([0, 1, 2], 1), soft([0, 1, 4], 2), soft([0, 5], 3)
    state = {STATE + name: array for name, array in given_arrays(mine, 3).items()}
    local = local_round(model, round_=4, aux=given_arrays(merge([mine, other, third]), 3), state=state)
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
    found = value(term, model)
    assert found == pytest.approx(1.5 * by_hand, rel=1e-5)
    assert term.end(model, result(), {})["soft-label-loss"] == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("kept_round", [2, None])
def test_who_sat_out_takes_nothing_out(kept_round: int | None) -> None:
    model, given = network("cnn"), soft(list(range(CLASSES)), 2)
    state = {}
    if kept_round is not None:
        state = {STATE + n: a for n, a in given_arrays(soft([0, 1], 1), kept_round).items()}
    term = SoftLabelDistillation(1.0)
    term.begin(model, local_round(model, round_=4, aux=given_arrays(given, 3), state=state))
    outputs = model(batch()[0]).double().softmax(1).detach().numpy()
    by_hand = -sum(float(given.vectors[y] @ np.log(outputs[y])) for y in range(6)) / 6
    assert value(term, model) == pytest.approx(by_hand, rel=1e-5)


def test_the_local_table_is_the_mean_output_by_label_over_the_phase() -> None:
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
    np.testing.assert_array_equal(objective.extra()[VECTORS], table.vectors)
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
            local = local_round(model, preset, round_, aux=aux, state=states[place], keep_optimizer=False)
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


# --- FedProto --------------------------------------------------------------------------------------


def prototypes(model: SingleHead, labels: list[int]) -> ClassTable:
    width = model.classifier.in_features
    vectors = np.random.default_rng(5).normal(size=(len(labels), width))
    return ClassTable.of(PROTOTYPE, CLASSES, labels, vectors)


def test_the_prototype_term_by_its_formula() -> None:
    model = network("cnn")
    given = prototypes(model, [0, 3, 9])
    term = PrototypeTerm(4.0)
    term.begin(model, local_round(model, aux=given_arrays(given, 0)))
    features = model.features(batch()[0]).detach().double().numpy()
    squares = [((features[y] - given.vectors[row]) ** 2).mean() for row, y in enumerate((0, 3))]
    assert value(term, model) == pytest.approx(4.0 * sum(squares) / 6, rel=1e-5)
    assert term.end(model, result(), {})["prototype-loss"] == pytest.approx(sum(squares) / 6, rel=1e-5)


def test_prototypes_reach_features_but_not_the_output_layer() -> None:
    model = network("cnn")
    alone = gradients(CrossEntropy(), model)
    objective = CrossEntropy() + PrototypeTerm(1.0)
    objective.begin(model, local_round(model, aux=given_arrays(prototypes(model, [0, 1, 2]), 0)))
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
    objective.begin(model, local_round(model, aux=given_arrays(wrong, 0)))
    with pytest.raises(TrainingError, match="prototypes 3"):
        objective.loss(model, *batch(), Generator())


# --- Co-distillation -------------------------------------------------------------------------------


def test_the_peers_term_by_its_formula() -> None:
    model, peers = network("cnn"), [network("mlp", seed=2), network("cnn-bn", seed=3)]
    term = PeerDistillation(0.5, burn_in=1, peers=lambda _: peers)
    term.begin(model, local_round(model, round_=2))
    images, _ = batch()
    with torch.no_grad():
        teacher = torch.stack([peer.eval()(images).softmax(1) for peer in peers]).mean(0)
        by_hand = -(teacher * model(images).log_softmax(1)).sum(1).mean().item()
    assert value(term, model) == pytest.approx(0.5 * by_hand, rel=1e-5)


def test_peers_are_never_changed_and_get_no_gradient() -> None:
    model, peer = network("cnn"), network("cnn-bn", seed=3)
    before = received(peer)
    objective = CrossEntropy() + PeerDistillation(1.0, peers=lambda _: [peer])
    local = local_round(model)
    train_local(model, objective, Images(12), local, seed=1, device="cpu")
    assert all(torch.equal(before[name], tensor) for name, tensor in peer.state_dict().items())
    assert all(p.grad is None for p in peer.parameters())


def test_no_term_during_the_burn_in_or_without_peers() -> None:
    model = network("cnn")
    for term in (PeerDistillation(1.0, burn_in=2, peers=lambda _: [network("mlp")]), PeerDistillation(1.0)):
        term.begin(model, local_round(model, round_=2))
        assert value(term, model) == 0.0
        assert term.end(model, result(), {}) == {}


def test_received_peers_are_the_others_networks() -> None:
    model, peer = network("cnn"), network("mlp", seed=2)
    aux = {"peer/b/" + name: array for name, array in model_arrays(peer).items()}
    known: dict[str, Any] = {"aux": aux, "peers": {"client": describe(model), "b": describe(peer)}}
    term, same = PeerDistillation(1.0), PeerDistillation(1.0, peers=lambda _: [peer])
    term.begin(model, local_round(model, **known))
    found = value(term, model)
    term.end(model, result(), {})
    same.begin(model, local_round(model))
    assert found == pytest.approx(value(same, model))
    assert found > math.log(10) / 2
    del aux["peer/b/classifier.bias"]
    with pytest.raises(WireError, match="b's network cannot be built"):
        term.begin(model, local_round(model, **known))


# --- All of them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("term", [SoftLabelDistillation(1.0), PrototypeTerm(1.0), PeerDistillation(1.0)])
def test_a_network_of_another_task_is_refused(term: Objective) -> None:
    other = nn.Linear(3, 3)
    with pytest.raises(TrainingError, match="for classifiers; a Linear"):
        term.begin(other, local_round(other))


@pytest.mark.parametrize("term", [SoftLabelDistillation(1.0), PrototypeTerm(1.0), PeerDistillation(1.0)])
def test_terms_stand_behind_the_base_loss_and_listen_until_the_end(term: Objective) -> None:
    model = network("cnn")
    term.begin(model, local_round(model))
    with pytest.raises(RuntimeError, match="after the base loss"):
        term.loss(model, *batch(), Generator())
    term.begin(model, local_round(model))
    value(term, model)
    term.end(model, result(), {})
    model(batch()[0])
    with pytest.raises(RuntimeError, match="after the base loss"):
        term.loss(model, *batch(), Generator())


def test_a_network_with_several_answers_is_refused() -> None:
    bases = initial_bases(RunConfig(model="cnn", seed=1), (1, 8, 8), CLASSES, 0.5, [0, 1]).train()
    objective = CrossEntropy() + SoftLabelDistillation(1.0)
    objective.begin(bases, local_round(bases))
    with pytest.raises(TrainingError, match="single output"):
        objective.loss(bases, *batch(), Generator())
    with pytest.raises(TrainingError, match="no features of a Bases"):
        PrototypeTerm(1.0).begin(bases, local_round(bases))
