"""Sampling from diffusion models with DDIM (Song et al., ICLR 2021, arXiv 2010.02502)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from espalier.models.noise_schedule import ScheduleSettings, ddim_schedule

if TYPE_CHECKING:
    from diffusers import DDIMScheduler


def sample(
    model: nn.Module,
    *,
    count: int,
    steps: int,
    seed: int,
    settings: ScheduleSettings | None = None,
    scheduler: DDIMScheduler | None = None,
    batch: int = 256,
) -> Tensor:
    """Sample images with DDIM.

    Parameters
    ----------
    model : nn.Module
        A UNet2DModel, pruned or not; its training mode is restored.
    count : int
        Number of images.
    steps : int
        Denoising steps (network evaluations per image).
    seed : int
        Seed of the initial noise, which is drawn on the CPU, so that it depends on neither device nor `batch`.
    settings : ScheduleSettings, optional
        Settings that define the schedule.
    scheduler : DDIMScheduler, optional
        The schedule itself; either this or `settings` is needed.
    batch : int
        Images per forward pass.

    Returns
    -------
    Tensor
        float32 [count, C, H, W] in [-1, 1] on the CPU.
    """
    if scheduler is None:
        if settings is None:
            raise TypeError("sample needs settings or a scheduler")
        scheduler = ddim_schedule(settings)
    rng = torch.Generator().manual_seed(seed % 2**63)
    noise = torch.randn((count, *image_shape(model)), generator=rng)
    return denoise(model, noise, steps=steps, scheduler=scheduler, batch=batch)


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """Return channels, height and width of the images of a UNet2DModel."""
    network = cast(Any, model)
    size = network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return network.config.in_channels, height, width


def denoise(
    model: nn.Module, noise: Tensor, *, steps: int, scheduler: DDIMScheduler, batch: int = 256
) -> Tensor:
    """Denoise with DDIM, eta 0, which is a deterministic function of the noise.

    Parameters
    ----------
    model : nn.Module
        A UNet2DModel; its training mode is restored.
    noise : Tensor
        Standard normal, float32 [count, C, H, W].
    steps : int
        Denoising steps (network evaluations per image).
    scheduler : DDIMScheduler
        The schedule.
    batch : int
        Images per forward pass.

    Returns
    -------
    Tensor
        float32 [count, C, H, W] in [-1, 1] on the CPU.
    """
    if len(noise) == 0:
        return noise
    network, training = cast(Any, model), model.training
    parameter = next(model.parameters())
    model.eval()
    drawn = []
    try:
        with torch.inference_mode():
            for image in torch.split(noise, batch):
                image = image.to(parameter.device, parameter.dtype)
                scheduler.set_timesteps(steps)
                for time in scheduler.timesteps.tolist():
                    predicted = network(image, time, return_dict=False)[0]
                    image = scheduler.step(predicted, time, image, eta=0.0, return_dict=False)[0]
                drawn.append(image.clamp(-1, 1).float().cpu())
    finally:
        model.train(training)
    return torch.cat(drawn).clone()
