"""A diffusion model from a run as a generator: the latent is the initial noise, the synthesis is DDIM."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from espalier.errors import ConfigError
from espalier.generators.base import Options
from espalier.models.pipeline import load_model
from espalier.models.sampling import denoise, image_shape
from espalier_server.generators.images import in_batches

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

_BATCH = 64


class DiffusionGenerator:
    """The model of a run of FedPhD or FedDiffuse as a :class:`~espalier.generators.base.Generator`.

    DDIM with eta 0 (Song et al. 2021) is a deterministic function of the initial noise, which is the latent here:
    H = C * S * S, with a standard normal distribution.

    Parameters
    ----------
    model : nn.Module
        A UNet2DModel, pruned or not.
    scheduler : DDIMScheduler
        Its sampling schedule.
    device : torch.device
        Device to compute on.
    steps : int
        Network evaluations per image.
    """

    def __init__(
        self, model: nn.Module, scheduler: DDIMScheduler, device: torch.device, steps: int = 50
    ) -> None:
        self.model = model.eval().requires_grad_(False).to(device)
        self.scheduler, self.steps = scheduler, steps
        self.shape = image_shape(model)

    @classmethod
    def open(cls, folder: Path, options: Options) -> DiffusionGenerator:
        """Open the ``model`` folder of a run.

        Raises
        ------
        StateError
            A file is missing or damaged; the message names it.
        ConfigError
            The model is not a diffusion model, or was trained with fewer time steps than ``options.steps``.
        """
        steps = options.steps
        model, scheduler, _ = load_model(folder)
        if type(model).__name__ != "UNet2DModel":
            raise ConfigError(
                f"generator: {folder} holds a {type(model).__name__}, which draws nothing; give the model of a "
                "run of a diffusion method"
            )
        trained = scheduler.config.num_train_timesteps
        if steps > trained:
            raise ConfigError(f"generator: {folder} has {trained} time steps; {steps} steps are too many")
        return cls(model, scheduler, options.device, steps)

    @property
    def latent_dim(self) -> int:
        """C * S * S."""
        return math.prod(self.shape)

    def sample_latents(self, count: int, rng: torch.Generator) -> Tensor:
        """Draw noise; see :class:`~espalier.generators.base.Generator`."""
        return torch.randn(count, self.latent_dim, generator=rng)

    def synthesise(self, latents: Tensor, size: int, channels: int) -> Tensor:
        """Denoise; see :class:`~espalier.generators.base.Generator`."""

        def draw(part: Tensor) -> Tensor:
            noise = part.reshape(-1, *self.shape)
            return denoise(self.model, noise, steps=self.steps, scheduler=self.scheduler)

        return in_batches(draw, latents, _BATCH, size, channels)
