"""Cross-entropy, whole and masked; exits and base networks; what is measured over a whole data set."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from espalier.config.run_config import RunConfig
from espalier.methods.depthfl import ExitDistillation, consistency_weight, mutual_divergence
from espalier.methods.divfl import ReceivedGradient
from espalier.methods.inclusivefl import LastExit
from espalier.methods.qfedavg import ReceivedLoss
from espalier.methods.splitmix import BaseLosses
from espalier.models.initial import initial_bases, initial_model
from espalier.tasks.base import base_objective, dataset_gradient, dataset_loss
from espalier.tasks.classification import CrossEntropy, MaskedCrossEntropy
from espalier.tasks.diffusion import DDPMLoss
from espalier.training.objectives import Objective, TrainingError
from espalier.training.trainer import train_local
from tests.support.terms import Images, batch, gradients, local_round, network, received, result


class Fixed(nn.Module):
    """Answers with its own logits, whatever the image."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([logits]))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


def one_image(label: int) -> tuple[Tensor, Tensor, Generator]:
    return torch.zeros(1, 1, 8, 8), torch.tensor([label]), Generator()


def masked(logits: list[float], counts: list[int]) -> tuple[Fixed, MaskedCrossEntropy]:
    model, term = Fixed(logits), MaskedCrossEntropy()
    term.begin(model, local_round(model, labels=np.array(counts)))
    return model, term


def test_masked_logits_are_zero_and_not_minus_infinity() -> None:
    """Two of ten labels with logits 1 and 2; the other eight add e^0 each to the denominator."""
    model, term = masked([1.0, 2.0, *[9.0] * 8], [3, 1, *[0] * 8])
    value = term.loss(model, *one_image(0))
    assert value.item() == pytest.approx(math.log(math.e + math.e**2 + 8) - 1)  # 1.896
    left_out = math.log(math.e + math.e**2) - 1  # 1.313: what minus infinity would give
    assert value.item() - left_out > 0.5


def test_labels_a_client_lacks_get_exactly_no_gradient() -> None:
    model, term = masked([1.0, 2.0, 9.0, -3.0], [3, 1, 0, 0])
    torch.autograd.backward(term.loss(model, *one_image(1)))
    assert model.logits.grad is not None
    total = math.e + math.e**2 + 2
    expected = [math.e / total, math.e**2 / total - 1, 0.0, 0.0]
    assert model.logits.grad[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert model.logits.grad[0, 2:].tolist() == [0.0, 0.0]


def test_rows_of_labels_a_client_lacks_do_not_move_in_training() -> None:
    counts = np.array([3, 3, 0, 0, 0, 0, 0, 0, 0, 0])
    data = Images(6)
    data.labels = np.array([0, 1, 0, 1, 0, 1])
    model = network("cnn")
    local = local_round(model, labels=counts)
    train_local(model, MaskedCrossEntropy(), data, local, seed=1, device="cpu")
    change = (model.classifier.weight - local.received["classifier.weight"]).abs().sum(1)
    assert (change[:2] > 0).all()
    assert (change[2:] == 0).all()


def test_a_client_without_labels_says_so() -> None:
    with pytest.raises(TrainingError, match="label counts are empty"):
        masked([1.0, 2.0], [0, 0])


def test_cross_entropy_is_the_mean_over_the_batch_and_the_sum_over_exits() -> None:
    model, (images, labels) = network("cnn"), batch()
    with torch.no_grad():
        log_p = model(images) - model(images).exp().sum(1, keepdim=True).log()
    value = CrossEntropy().loss(model, images, labels, Generator())
    assert value.item() == pytest.approx(-log_p[range(6), labels].mean().item(), rel=1e-5)
    exits = network("depth-cnn")
    parts = [functional.cross_entropy(z, labels).item() for z in exits(images)]
    assert len(parts) == 3
    assert CrossEntropy().loss(exits, images, labels, Generator()).item() == pytest.approx(sum(parts))


def test_the_objective_follows_the_models_task() -> None:
    assert isinstance(base_objective(RunConfig(model="unet-tiny")), DDPMLoss)
    assert isinstance(base_objective(RunConfig(model="cnn")), CrossEntropy)


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


def test_without_distillation_or_with_one_exit_cross_entropy_is_left() -> None:
    for depth, distillation in ((3, False), (1, True)):
        value, logits, labels = distilled(301, depth, distillation=distillation)
        expected = sum(functional.cross_entropy(z, labels).item() for z in logits)
        assert value == pytest.approx(expected, rel=1e-5)


def test_the_last_exit_alone_leaves_the_others_without_gradient() -> None:
    model, (images, labels) = network("depth-cnn"), batch()
    term = LastExit()
    term.begin(model, local_round(model, "depth-cnn"))
    expected = functional.cross_entropy(model.exits(images)[-1], labels).item()
    assert term.loss(model, images, labels, Generator()).item() == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients(term, model).items():
        silent = name.startswith(("exit1.", "exit2."))
        assert bool((gradient == 0).all()) == silent, name


def test_a_network_without_exits_is_refused() -> None:
    for term in (ExitDistillation(), LastExit()):
        with pytest.raises(TrainingError, match="depth-cnn"):
            term.begin(network("cnn"), local_round(network("cnn")))


def test_base_networks_are_trained_on_their_own() -> None:
    model = initial_bases(RunConfig(model="cnn", seed=1), (1, 8, 8), 10, 0.5, [3, 5])
    both = gradients(BaseLosses(), model)
    assert {name.partition(".")[0] for name in both} == {"base3", "base5"}
    for number in (3, 5):
        alone = gradients(CrossEntropy(), model.get_submodule(f"base{number}"))
        for name, gradient in alone.items():
            assert torch.allclose(both[f"base{number}.{name}"], gradient, atol=1e-7)
            assert gradient.abs().sum() > 0


def test_the_loss_over_a_data_set_is_in_eval_mode_and_counts_images_alike() -> None:
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


def test_a_random_mini_batch_of_a_data_set_is_drawn_without_replacement() -> None:
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
        assert np.allclose(extra["gradient/" + name], parameter.grad.numpy(), atol=1e-6)
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
