"""The loss of denoising diffusion models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from espalier import lazy, models
from espalier.tasks.diffusion_settings import DiffusionSettings
from espalier.training.objectives import LocalRound, Objective

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn
    from torch.nn import functional
else:
    torch, functional = lazy.load("torch"), lazy.load("torch.nn.functional")


class DDPMLoss(Objective):
    """The simple loss of denoising diffusion (Ho et al. 2020, eq. 14).

    ``mean (eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t))^2`` with t uniform over the T steps
    of a linear beta schedule.
    """

    depends_on = "images"

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Build the noise schedule from the run's settings."""
        self._schedule = models.noise_schedule(local.settings.of(DiffusionSettings))

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the mean squared error of the predicted noise."""
        device = images.device
        steps: int = self._schedule.config.num_train_timesteps
        noise = torch.randn(images.shape, generator=generator, device=device, dtype=images.dtype)
        times = torch.randint(steps, (images.shape[0],), generator=generator, device=device)
        noisy = self._schedule.add_noise(images, noise, times)
        predicted: Tensor = cast(Any, model)(noisy, times, return_dict=False)[0]
        return functional.mse_loss(predicted.float(), noise)
