"""The objective of a task, and its loss and gradient over a data set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from espalier.methods.run_config import RunConfig
from espalier.tasks.base import base_objective, dataset_gradient, dataset_loss
from espalier.tasks.classification import CrossEntropy
from espalier.tasks.diffusion import DDPMLoss
from espalier.training.objectives import Objective
from tests.support.terms import Images, network


def test_the_objective_follows_the_models_task() -> None:
    assert isinstance(base_objective(RunConfig(model="unet-tiny")), DDPMLoss)
    assert isinstance(base_objective(RunConfig(model="cnn")), CrossEntropy)


def test_the_loss_over_a_data_set_is_per_image_in_eval_mode() -> None:
    model, data = network("cnn-bn"), Images(20)
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    model.get_submodule("conv1").eval()
    found = dataset_loss(model, CrossEntropy(), data, "cpu", 8, Generator())
    assert model.training
    assert not model.get_submodule("conv1").training
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in model.named_buffers())
    model.eval()
    with torch.no_grad():
        expected = functional.cross_entropy(model(data.images), torch.from_numpy(data.labels)).item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_mini_batch_is_drawn_without_replacement() -> None:
    seen: list[Tensor] = []

    class Look(Objective):
        def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
            assert torch.equal(images[:, 0, 0, 0], data.images[labels, 0, 0, 0])
            seen.append(labels)
            return torch.zeros(())

    data = Images(10)
    for seed in (1, 1, 2):
        dataset_loss(nn.Identity(), Look(), data, "cpu", 4, Generator().manual_seed(seed), batches=2)
    labels = [torch.cat(seen[i : i + 2]).tolist() for i in (0, 2, 4)]
    assert [len(set(one)) for one in labels] == [8, 8, 8]
    assert labels[0] == labels[1] != labels[2]


def test_the_gradient_over_a_data_set_is_that_of_its_mean_loss() -> None:
    model, data = network("cnn-bn"), Images(20)
    found = dataset_gradient(model, CrossEntropy(), data, "cpu", 8, Generator())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    torch.autograd.backward(functional.cross_entropy(model(data.images), torch.from_numpy(data.labels)))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert np.allclose(found[name], parameter.grad.numpy(), atol=1e-6), name


def test_the_gradient_over_a_data_set_by_finite_differences() -> None:
    model, data = network("logistic").double(), Images(6)
    data.images = data.images.double()
    found = dataset_gradient(model, CrossEntropy(), data, "cpu", 4, Generator())["classifier.weight"]
    weight, losses = model.classifier.weight, []
    for shift in (1e-3, -1e-3):
        with torch.no_grad():
            weight[3, 7] += shift
        losses.append(dataset_loss(model, CrossEntropy(), data, "cpu", 4, Generator()))
        with torch.no_grad():
            weight[3, 7] -= shift
    assert found[3, 7] == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=1e-2)
