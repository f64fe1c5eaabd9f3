"""The DDPM loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from espalier.methods.run_config import RunConfig
from espalier.tasks.diffusion import DDPMLoss
from espalier.training.objectives import LocalRound

IMAGES, LABELS = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


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
