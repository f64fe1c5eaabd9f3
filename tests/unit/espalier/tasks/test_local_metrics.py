"""Loss and gradient over all of a client's images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from espalier.methods.divfl import ReceivedGradient
from espalier.methods.qfedavg import ReceivedLoss
from espalier.methods.run_config import RunConfig
from espalier.models.initial import initial_model
from espalier.tasks.classification import CrossEntropy
from espalier.training.objectives import TrainingError
from espalier.wire.sections import GRADIENT
from espalier_client.trainer import train_local
from tests.support.terms import Images, local_round, network, received, result


def test_the_received_models_loss_and_gradient_are_reported() -> None:
    data, model = Images(20), network("cnn")
    objective = CrossEntropy() + ReceivedLoss() + ReceivedGradient()
    local = local_round(model, data=data)
    outcome = train_local(model, objective, data, local, seed=1, device="cpu")
    extra = objective.extra()
    metrics = objective.end(model, outcome, received(model))
    start = network("cnn")
    loss = functional.cross_entropy(start(data.images), torch.from_numpy(data.labels))
    torch.autograd.backward(loss)
    assert metrics["received-loss"] == pytest.approx(loss.item() + 1e-10, rel=1e-6)
    for name, parameter in start.named_parameters():
        assert parameter.grad is not None
        assert np.allclose(extra[GRADIENT][name], parameter.grad.numpy(), atol=1e-6)
    alone = network("cnn")
    train_local(alone, CrossEntropy(), data, local_round(alone), seed=1, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))


def test_a_diffusion_models_received_loss_is_the_same_every_time() -> None:
    def measured(name: str) -> float:
        model = initial_model(RunConfig(model="unet-tiny", seed=1), (1, 8, 8))
        local = local_round(model, "unet-tiny", data=Images(8))
        local.name = name
        term = ReceivedLoss()
        term.begin(model, local)
        return term.end(model, result(), received(model))["received-loss"]

    assert measured("a") == measured("a") != measured("b")


def test_a_loss_that_was_asked_of_no_images_says_so() -> None:
    with pytest.raises(TrainingError, match="no images"):
        ReceivedLoss().begin(network("cnn"), local_round(network("cnn")))
