from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from espalier.methods.run_config import RunConfig
from espalier.training.objectives import LocalRound, Objective, Sum
from espalier_client.optimizers import learning_rate, optimizer_kind
from espalier_client.trainer import train_local
from tests.support.terms import Images


class Pull(Objective):
    """Half the squared distance to 1: the gradient of a parameter theta is theta - 1, on every batch."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        self.sizes.append(len(images))
        return torch.stack([(p - 1).square().sum() / 2 for p in model.parameters()]).sum()


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([5.0]))


def settings(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {"model": "cnn", "batch_size": 8, "clip_norm": 0.0} | changes
    return RunConfig(**values)


def test_default_optimizer_of_each_task() -> None:
    kinds = [
        optimizer_kind(LocalRound(settings(model=model, optimizer=own), 1, optimizer=demanded))
        for model, own, demanded in (
            ("unet-tiny", "auto", ""),
            ("cnn", "auto", ""),
            ("unet-tiny", "sgd", ""),
            ("cnn", "adam", ""),
            ("unet-tiny", "auto", "sgd"),
        )
    ]
    assert kinds == ["adam", "sgd", "sgd", "adam", "sgd"]


def test_step_sizes_have_defaults_and_decay_from_round_to_round() -> None:
    for model, expected in (("cnn", 0.05), ("unet-tiny", 0.001)):
        assert learning_rate(LocalRound(RunConfig(model=model), 1)) == expected
    decaying = RunConfig(model="cnn", learning_rate=0.2, learning_rate_decay=0.5)
    assert [learning_rate(LocalRound(decaying, r)) for r in (1, 2, 4)] == pytest.approx([0.2, 0.1, 0.025])


def test_sgd_has_momentum_and_weight_decay_and_no_warm_up() -> None:
    model, state = Scalar(), dict[str, np.ndarray]()
    local = LocalRound(settings(learning_rate=0.1, momentum=0.5, weight_decay=0.25), 1, state=state)
    result = train_local(model, Pull(), Images(20), local, seed=1, device="cpu")
    theta = buffer = 5.0
    for step in range(3):
        gradient = (theta - 1) + 0.25 * theta
        buffer = gradient if step == 0 else 0.5 * buffer + gradient
        theta -= 0.1 * buffer
    assert model.theta.item() == pytest.approx(theta)
    assert result.lr_sum == pytest.approx(0.3)
    assert state == {}


def test_momentum_is_new_in_every_round() -> None:
    after = []
    for rounds in (1, 2):
        model, state = Scalar(), dict[str, np.ndarray]()
        for number in range(1, rounds + 1):
            local = LocalRound(settings(learning_rate=0.1, momentum=0.9), number, state=state)
            train_local(model, Pull(), Images(8), local, seed=number, device="cpu")
        after.append(model.theta.item())
    # Each round is a single step along theta - 1; a kept buffer would add 0.9 * 4 to the second.
    assert after == pytest.approx([5 - 0.1 * 4, 4.6 - 0.1 * 3.6])


def test_steps_go_on_through_epochs_and_stop_where_they_should() -> None:
    for steps, sizes in ((2, [8, 8]), (5, [8, 8, 4, 8, 8]), (0, [8, 8, 4] * 3)):
        objective = Pull()
        local = LocalRound(settings(local_steps=steps, local_epochs=3), 1)
        result = train_local(Scalar(), objective, Images(20), local, seed=1, device="cpu")
        assert objective.sizes == sizes
        assert (result.steps, result.samples) == (len(sizes), 20)
        assert result.lr_sum == pytest.approx(0.05 * len(sizes))


def test_the_loss_is_the_mean_over_the_images_that_were_seen() -> None:
    result = train_local(
        Scalar(),
        Pull(),
        Images(12),
        LocalRound(settings(local_steps=3, learning_rate=0.5), 1),
        seed=1,
        device="cpu",
    )
    # theta - 1 halves with every step: 4, 2, 1; batches of 8, 4 and 8 images.
    assert result.loss == pytest.approx((8 * 8 + 4 * 2 + 8 * 0.5) / 20)


@pytest.mark.parametrize(("by_itself", "theta", "own"), [(False, 4 / 5, 3 / 5), (True, 1.0, 1.0)])
def test_a_terms_own_parameters_are_trained_and_clipped(by_itself: bool, theta: float, own: float) -> None:
    class Brings(Objective):
        def __init__(self) -> None:
            self.own = nn.Parameter(torch.tensor([4.0]))

        def separately_clipped_parameters(self) -> list[nn.Parameter]:
            return [self.own] if by_itself else []

        def parameters(self) -> list[nn.Parameter]:
            return [self.own]

        def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
            return (self.own - 1).square().sum() / 2

    brings, model = Brings(), Scalar()
    local = LocalRound(settings(learning_rate=1.0, clip_norm=1.0), 1)
    train_local(model, Sum((Pull(), brings)), Images(8), local, seed=1, device="cpu")
    # The joint gradient is (4, 3), of norm 5; each by itself is cut to 1.
    assert model.theta.item() == pytest.approx(5 - theta, rel=1e-5)
    assert brings.own.item() == pytest.approx(4 - own, rel=1e-5)


def test_adam_takes_the_weight_decay_too() -> None:
    class Nothing(Pull):
        def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
            return 0.0 * torch.stack([p.sum() for p in model.parameters()]).sum()

    model = Scalar()
    local = LocalRound(settings(optimizer="adam", weight_decay=0.1, warmup_steps=0), 1)
    train_local(model, Nothing(), Images(8), local, seed=1, device="cpu")
    # Adam's first step is of the size of the rate, against the sign of the penalty's gradient.
    assert model.theta.item() == pytest.approx(5 - 0.001, abs=1e-6)
