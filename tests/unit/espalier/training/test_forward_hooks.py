"""Terms that use the base loss's forward pass: what they refuse, and their hooks."""

from __future__ import annotations

import pytest
from torch import Generator, nn

from espalier.methods.codistillation import PeerDistillation
from espalier.methods.fd import SoftLabelDistillation
from espalier.methods.fedproto import PrototypeTerm
from espalier.methods.run_config import RunConfig
from espalier.models.initial import initial_bases
from espalier.tasks.classification import CrossEntropy
from espalier.training.objectives import Objective, TrainingError
from tests.support.terms import added_loss, batch, local_round, network, result

CLASSES = 10


@pytest.mark.parametrize("term", [SoftLabelDistillation(1.0), PrototypeTerm(1.0), PeerDistillation(1.0)])
def test_a_network_of_another_task_is_refused(term: Objective) -> None:
    other = nn.Linear(3, 3)
    with pytest.raises(TrainingError, match="for classifiers; a Linear"):
        term.begin(other, local_round(other))


@pytest.mark.parametrize("term", [SoftLabelDistillation(1.0), PrototypeTerm(1.0), PeerDistillation(1.0)])
def test_terms_follow_the_base_loss(term: Objective) -> None:
    model = network("cnn")
    term.begin(model, local_round(model))
    with pytest.raises(RuntimeError, match="after the base loss"):
        term.loss(model, *batch(), Generator())
    term.begin(model, local_round(model))
    added_loss(term, model)
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
