"""The noise schedule of diffusion models: linear betas, for training (DDPM) and for sampling (DDIM)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DDPMScheduler


class ScheduleSettings(Protocol):
    """The settings of a run that define the noise schedule."""

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
    """Return the sampling schedule for :func:`noise_schedule`.

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
