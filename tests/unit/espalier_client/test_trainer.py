from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from espalier.errors import ConfigError
from espalier.methods.fedphd import GroupNormPenalty
from espalier.methods.run_config import RunConfig
from espalier.models.pruning import prune
from espalier.models.unet import unet
from espalier.tasks.diffusion import DDPMLoss
from espalier.training.device import resolve_device
from espalier.training.objectives import LocalResult, LocalRound, Objective
from espalier_client.trainer import TrainingError, train_local
from tests.support.terms import Images


class Fit(Objective):
    """Predict an image's mean from its pixels; remembers the batches it saw."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.batches: list[tuple[Tensor, Tensor]] = []

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        self.batches.append((images, labels))
        return functional.mse_loss(model(images.flatten(1)), images.mean((1, 2, 3))[:, None] * self.scale)

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        raise AssertionError("the caller ends the round, once the update is coded")


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 1)


def settings(**changes: Any) -> RunConfig:
    return RunConfig(**({"batch_size": 8, "warmup_steps": 4, "learning_rate": 0.01} | changes))


def train(
    model: nn.Module, objective: Objective, local: LocalRound, count: int = 20, seed: int = 1
) -> LocalResult:
    return train_local(model, objective, Images(count), local, seed=seed, device="cpu")


def test_it_is_adam_with_warm_up_and_clipping() -> None:
    model, objective = linear(), Fit()
    result = train(model, objective, LocalRound(settings(local_epochs=2, clip_norm=0.05), 1))
    # The same by the textbook (Kingma and Ba 2015, algorithm 1), over the batches that were seen.
    weights = {n: p.detach().double().clone() for n, p in linear().named_parameters()}
    first = {n: torch.zeros_like(w) for n, w in weights.items()}
    second = {n: torch.zeros_like(w) for n, w in weights.items()}
    losses = []
    for step, (images, _) in enumerate(objective.batches, 1):
        leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
        images = images.double()
        predicted = images.flatten(1) @ leaves["weight"].T + leaves["bias"]
        loss = (predicted - images.mean((1, 2, 3))[:, None]).square().mean()
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        losses.append((loss.item(), len(images)))
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        rate = 0.01 * min(1, step / 4)
        for name, gradient in gradients.items():
            clipped = gradient * min(1.0, 0.05 / (norm.item() + 1e-6))
            first[name] = 0.9 * first[name] + 0.1 * clipped
            second[name] = 0.999 * second[name] + 0.001 * clipped**2
            corrected = second[name] / (1 - 0.999**step)
            weights[name] -= rate * first[name] / (1 - 0.9**step) / (corrected.sqrt() + 1e-8)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.double(), weights[name], atol=1e-5)
    assert (result.steps, result.samples) == (6, 20)
    assert result.lr_sum == pytest.approx(0.01 * (1 / 4 + 2 / 4 + 3 / 4 + 3))
    assert result.loss == pytest.approx(sum(value * n for value, n in losses) / 40, rel=1e-5)
    assert result.metrics == {}
    assert result.seconds > 0


def test_every_epoch_visits_every_image_once_in_a_new_order() -> None:
    objective = Fit()
    train(linear(), objective, LocalRound(settings(local_epochs=2), 1))
    seen = torch.cat([images for images, _ in objective.batches]).flatten(1)
    epochs = [[row.tolist() for row in seen[at : at + 20]] for at in (0, 20)]
    everything = Images(20)
    assert (
        sorted(epochs[0]) == sorted(epochs[1]) == sorted(row.tolist() for row in everything.images.flatten(1))
    )
    assert epochs[0] != epochs[1]
    for images, labels in objective.batches:
        for image, label in zip(images, labels, strict=True):
            index = next(i for i in range(20) if torch.equal(everything.images[i], image))
            assert everything.labels[index] == label


def trained(seed: int, noise_before: int) -> dict[str, Tensor]:
    torch.manual_seed(noise_before)
    model = unet("unet-tiny", 1, 8)
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    torch.manual_seed(noise_before)
    torch.rand(noise_before)
    train(model, DDPMLoss() + GroupNormPenalty(1e-5), LocalRound(settings(flip=True), 1), seed=seed)
    after = torch.rand(3)
    torch.manual_seed(noise_before)
    torch.rand(noise_before)
    assert torch.equal(after, torch.rand(3)), "training moved torch's global generator"
    return dict(model.state_dict())


def test_the_result_depends_on_the_seed_alone() -> None:
    one, same, other = trained(1, 3), trained(1, 8), trained(2, 3)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["conv_in.weight"], other["conv_in.weight"])


def test_moments_and_warm_up_go_on_from_round_to_round() -> None:
    """Two rounds from one state are one run of the same batches."""
    model, objective, state = linear(), Fit(), dict[str, np.ndarray]()
    rates = []
    for number in (1, 2):
        before = {key: array.copy() for key, array in state.items()}
        held = dict(state)
        rates.append(train(model, objective, LocalRound(settings(), number, state=state), seed=number).lr_sum)
        assert all(np.array_equal(held[key], before[key]) for key in before), "a former state was written to"
    assert rates == [pytest.approx(0.01 * (1 / 4 + 2 / 4 + 3 / 4)), pytest.approx(0.03)]
    assert state["trainer/steps"] == 6
    whole = linear()
    adam = torch.optim.Adam(whole.parameters(), lr=0.01)
    for step, (images, labels) in enumerate(objective.batches, 1):
        adam.param_groups[0]["lr"] = 0.01 * min(1, step / 4)
        adam.zero_grad()
        torch.autograd.backward(Fit().loss(whole, images, labels, torch.Generator()))
        nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        adam.step()
    assert torch.allclose(model.weight, whole.weight, atol=1e-6)
    moments = torch.cat([adam.state[p]["exp_avg"].flatten() for p in whole.parameters()])
    assert np.allclose(state["trainer/exp_avg"], moments.numpy(), atol=1e-7)


def test_adam_goes_on_in_a_rounds_own_arrays_to_the_same_bits() -> None:
    ends = []
    for own in (False, True):
        model, state = linear(), dict[str, np.ndarray]()
        train(model, Fit(), LocalRound(settings(), 1, state=state))
        held = {key: state[key] for key in ("trainer/exp_avg", "trainer/exp_avg_sq")}
        train(model, Fit(), LocalRound(settings(), 2, state=state, own_state=own))
        assert all(np.shares_memory(state[key], array) is own for key, array in held.items())
        ends.append(
            [p.detach().clone() for p in model.parameters()] + [torch.from_numpy(state[k]) for k in held]
        )
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_own_arrays_that_cannot_be_written_are_copied() -> None:
    state = dict[str, np.ndarray]()
    train(linear(), Fit(), LocalRound(settings(), 1, state=state))
    former = state["trainer/exp_avg"]
    before = former.copy()
    former.flags.writeable = False
    train(linear(), Fit(), LocalRound(settings(), 2, state=state, own_state=True))
    assert np.array_equal(former, before)
    assert not np.array_equal(state["trainer/exp_avg"], before)


def test_without_keeping_the_optimizer_only_the_warm_up_goes_on() -> None:
    state = dict[str, np.ndarray]()
    local = LocalRound(settings(), 1, state=state)
    train(linear(), Fit(), local)
    assert "trainer/exp_avg" in state
    result = train(linear(), Fit(), LocalRound(settings(keep_optimizer=False), 2, state=state))
    assert result.lr_sum == pytest.approx(0.03)
    assert sorted(state) == ["trainer/shapes", "trainer/steps"]


def test_a_pruned_model_starts_moments_and_warm_up_anew() -> None:
    torch.manual_seed(0)
    model, state = unet("unet-tiny", 1, 8), dict[str, np.ndarray]()
    train(model, DDPMLoss(), LocalRound(settings(), 1, state=state))
    size = state["trainer/exp_avg"].size
    result = train(prune(model, 0.2), DDPMLoss(), LocalRound(settings(), 2, state=state))
    assert result.lr_sum == pytest.approx(0.01 * (1 / 4 + 2 / 4 + 3 / 4))
    assert state["trainer/steps"] == 3
    assert state["trainer/exp_avg"].size < size


def test_a_non_finite_loss_is_an_error() -> None:
    state = dict[str, np.ndarray]()
    train(linear(), Fit(), LocalRound(settings(), 1, state=state))
    before = {key: array.copy() for key, array in state.items()}
    with pytest.raises(TrainingError, match="not finite in epoch 1 of round 2; lower learning-rate"):
        train(linear(), Fit(scale=float("inf")), LocalRound(settings(), 2, state=state))
    assert all(np.array_equal(state[key], before[key]) for key in before)
    assert len(state) == len(before)


def test_a_client_without_images_says_so() -> None:
    with pytest.raises(TrainingError, match="no images"):
        train(linear(), Fit(), LocalRound(settings(), 1), count=0)


def test_mirroring_flips_about_half_of_the_images_left_to_right() -> None:
    objective, data = Fit(), Images(400)
    train(linear(), objective, LocalRound(settings(flip=True, batch_size=400), 1), count=400)
    (images, _) = objective.batches[0]
    known = {row.numpy().tobytes() for row in data.images}
    mirrored = [image for image in images if image.numpy().tobytes() not in known]
    assert 150 < len(mirrored) < 250
    assert all(image.flip(-1).contiguous().numpy().tobytes() in known for image in mirrored)


def test_bf16_is_used_where_it_is_asked_for() -> None:
    kinds = []

    class Look(Fit):
        def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
            kinds.append(model(images.flatten(1)).dtype)
            return super().loss(model, images, labels, generator)

    for precision in ("auto", "fp32", "bf16"):
        train(linear(), Look(), LocalRound(settings(precision=precision), 1), count=8)
    assert kinds == [torch.float32, torch.float32, torch.bfloat16]


def test_objectives_see_gradients_before_the_step() -> None:
    class Frozen(Fit):
        def after_backward(self, model: nn.Module) -> None:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.zero_()

    model = linear()
    train(model, Frozen(), LocalRound(settings(), 1))
    assert torch.equal(model.weight, linear().weight)


def test_devices() -> None:
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    for wrong in ("abacus", "cuda:99", "meta"):
        with pytest.raises(ConfigError, match=f"device: '{wrong}' cannot be used here"):
            resolve_device(wrong)
