"""The noise schedule of a run, drawing images with DDIM, and the moving average of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DDPMScheduler


class ScheduleSettings(Protocol):
    """The part of a run's configuration that the noise schedule depends on."""

    @property
    def timesteps(self) -> int: ...  # noqa: D102
    @property
    def beta_start(self) -> float: ...  # noqa: D102
    @property
    def beta_end(self) -> float: ...  # noqa: D102


def noise_schedule(settings: ScheduleSettings) -> DDPMScheduler:
    """Return the training schedule: linear betas, ``beta_start`` to ``beta_end`` in ``timesteps`` steps."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=settings.timesteps,
        beta_start=settings.beta_start,
        beta_end=settings.beta_end,
        beta_schedule="linear",
        prediction_type="epsilon",
    )


def ddim_schedule(settings: ScheduleSettings) -> DDIMScheduler:
    """Return the sampling schedule that belongs to :func:`noise_schedule`.

    DDIM (Song et al. 2021) with eta 0 over evenly spaced steps that end at T - 1 ("trailing"), the predicted
    image clipped to [-1, 1].
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=settings.timesteps,
        beta_start=settings.beta_start,
        beta_end=settings.beta_end,
        beta_schedule="linear",
        prediction_type="epsilon",
        timestep_spacing="trailing",
        clip_sample=True,
    )


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
    """Draw images with DDIM.

    Parameters
    ----------
    model : nn.Module
        A UNet2DModel, pruned or not; left in the mode it was in.
    count : int
        Number of images.
    steps : int
        Network evaluations per image.
    seed : int
        Seed of the initial noise, which is drawn on the CPU: every device starts from the same noise,
        whatever `batch` is.
    settings : ScheduleSettings, optional
        Run configuration the schedule is taken from.
    scheduler : DDIMScheduler, optional
        The schedule itself; either this or `settings` is needed.
    batch : int
        Images at a time.

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
    """Turn given noise into images with DDIM, eta 0; the same noise always gives the same image.

    Parameters
    ----------
    model : nn.Module
        A UNet2DModel; left in the mode it was in.
    noise : Tensor
        Standard normal, float32 [count, C, H, W].
    steps : int
        Network evaluations per image.
    scheduler : DDIMScheduler
        The schedule.
    batch : int
        Images at a time.

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


def ema_update(
    average: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray], decay: float
) -> dict[str, np.ndarray]:
    """Move an exponential average of a model's arrays towards a new model.

    Parameters
    ----------
    average : mapping of str to numpy.ndarray
        The average so far; left as it is. Empty, or of other shapes (the model was pruned since): the
        average starts anew at `new`.
    new : mapping of str to numpy.ndarray
        The model's arrays.
    decay : float
        In [0, 1): ``average <- decay * average + (1 - decay) * new``.

    Returns
    -------
    dict of str to numpy.ndarray
        The new average, of the dtypes of `new`; arrays that are not floating point are those of `new`.
    """
    shapes = {name: array.shape for name, array in new.items()}
    if {name: array.shape for name, array in average.items()} != shapes:
        return {name: array.copy() for name, array in new.items()}
    moved = {}
    for name, array in new.items():
        if array.dtype.kind == "f":
            moved[name] = (decay * average[name] + (1 - decay) * array).astype(array.dtype)
        else:
            moved[name] = array.copy()
    return moved
