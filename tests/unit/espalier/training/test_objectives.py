from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from espalier.config.run_config import RunConfig
from espalier.methods.fedphd import GroupNormPenalty
from espalier.models.pruning import prune
from espalier.models.unet import unet
from espalier.tasks.diffusion import DDPMLoss
from espalier.training.objectives import LocalResult, LocalRound, Objective

IMAGES, LABELS = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def result() -> LocalResult:
    return LocalResult(steps=1, samples=1, loss=0.0, lr_sum=0.0, seconds=0.0)


class Recorder(nn.Module):
    """A network that keeps what it was asked and predicts a constant."""

    def __init__(self, answer: float) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.tensor(answer))

    def forward(self, noisy: Tensor, times: Tensor, return_dict: bool) -> tuple[Tensor]:
        assert not return_dict
        self.noisy, self.times = noisy, times
        return (self.answer.expand_as(noisy),)


def test_the_ddpm_loss_is_the_error_of_the_predicted_noise() -> None:
    settings = RunConfig(timesteps=50, beta_start=0.001, beta_end=0.05)
    network, objective = Recorder(0.25), DDPMLoss()
    objective.begin(network, LocalRound(settings, 1))
    images = torch.rand(6, 1, 4, 4, generator=seeded(5)) * 2 - 1
    loss = objective.loss(network, images, torch.zeros(6), seeded())
    # By hand: abar_t is the product of 1 - beta over the first t + 1 steps of the linear schedule.
    abar = np.cumprod(1 - np.linspace(0.001, 0.05, 50))[network.times.numpy()].reshape(-1, 1, 1, 1)
    noise = (network.noisy.detach().numpy() - np.sqrt(abar) * images.numpy()) / np.sqrt(1 - abar)
    assert loss.item() == pytest.approx(np.square(noise - 0.25).mean(), rel=1e-4)
    assert loss.requires_grad


def test_noise_and_times_come_from_the_generator_alone() -> None:
    network, objective = Recorder(0.0), DDPMLoss()
    objective.begin(network, LocalRound(RunConfig(), 1))
    losses = [objective.loss(network, IMAGES, LABELS, seeded(s)).item() for s in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_times_cover_all_steps_evenly() -> None:
    network, objective = Recorder(0.0), DDPMLoss()
    objective.begin(network, LocalRound(RunConfig(timesteps=4, sample_steps=4), 1))
    objective.loss(network, torch.zeros(8000, 1, 1, 1), LABELS, seeded())
    counts = torch.bincount(network.times, minlength=4)
    assert len(counts) == 4
    assert (counts - 2000).abs().max() < 200


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.GroupNorm(1, 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
            self.linear.bias.fill_(100.0)
            self.norm.weight.copy_(torch.tensor([5.0, 12.0]))


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a net of no registered family pass for one that is not pruned."""
    monkeypatch.setattr("espalier.methods.fedphd.models.is_reduced", lambda model: False)


@pytest.mark.usefixtures("whole")
def test_the_penalty_sums_the_norms_of_whole_weights() -> None:
    net, penalty = Net(), GroupNormPenalty(0.1)
    penalty.begin(net, LocalRound(RunConfig(), 1))
    value = penalty.loss(net, IMAGES, LABELS, seeded())
    # ||diag(3, 4)|| = 5 and ||(5, 12)|| = 13; biases do not count.
    assert value.item() == pytest.approx(0.1 * (5 + 13))
    torch.autograd.backward(value)
    assert net.linear.weight.grad is not None
    assert torch.allclose(net.linear.weight.grad, 0.1 * net.linear.weight / 5)
    assert net.linear.bias.grad is None
    assert penalty.end(net, result(), {}) == {"sparse-penalty": pytest.approx(1.8)}


@pytest.mark.usefixtures("whole")
def test_a_weight_that_is_all_zero_gets_a_finite_gradient() -> None:
    net, penalty = Net(), GroupNormPenalty(1.0)
    nn.init.zeros_(net.linear.weight)
    penalty.begin(net, LocalRound(RunConfig(), 1))
    torch.autograd.backward(penalty.loss(net, IMAGES, LABELS, seeded()))
    assert net.linear.weight.grad is not None
    assert torch.equal(net.linear.weight.grad, torch.zeros(2, 2))


@pytest.mark.usefixtures("whole")
def test_the_penaltys_weight_is_the_runs_unless_given() -> None:
    net, penalty = Net(), GroupNormPenalty()
    penalty.begin(net, LocalRound(RunConfig(sparse_weight=0.5), 1))
    assert penalty.loss(net, IMAGES, LABELS, seeded()).item() == pytest.approx(9.0)


def test_there_is_no_penalty_without_a_weight_or_on_a_pruned_network() -> None:
    dense = unet("unet-tiny", 1, 8)
    for model, weight, expected in ((dense, 0.0, False), (prune(dense, 0.2), 1.0, False), (dense, 1.0, True)):
        penalty = GroupNormPenalty(weight)
        penalty.begin(model, LocalRound(RunConfig(), 1))
        value = penalty.loss(model, IMAGES, LABELS, seeded())
        assert (value.item() > 0) == expected
        assert bool(penalty.end(model, result(), {})) == expected


class Term(Objective):
    def __init__(self, name: str, value: float, log: list[str]) -> None:
        self.name, self.value, self.log = name, value, log

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        self.log.append(f"begin {self.name}")

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        return torch.tensor(self.value)

    def after_backward(self, model: nn.Module) -> None:
        self.log.append(f"backward {self.name}")

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        return {self.name: self.value}


def test_terms_add_up_and_act_in_order() -> None:
    log: list[str] = []
    objective = Term("a", 1.0, log) + (Term("b", 2.0, log) + Term("c", 4.0, log))
    settings: Any = SimpleNamespace()
    net = nn.Identity()
    objective.begin(net, LocalRound(settings, 1))
    assert objective.loss(net, IMAGES, LABELS, seeded()).item() == 7.0
    objective.after_backward(net)
    assert log == [f"{step} {name}" for step in ("begin", "backward") for name in "abc"]
    assert objective.end(net, result(), {}) == {"a": 1.0, "b": 2.0, "c": 4.0}


def test_a_bare_objective_says_that_it_has_no_loss() -> None:
    with pytest.raises(NotImplementedError):
        Objective().loss(nn.Identity(), IMAGES, LABELS, seeded())
