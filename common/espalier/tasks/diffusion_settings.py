"""The settings of the diffusion task: noise schedule, sampling and evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from espalier.config.fields import LARGEST_EXACT, Int, PositiveInt, SettingsGroup


class DiffusionSettings(SettingsGroup):
    """The linear noise schedule, and the images that are drawn with it."""

    timesteps: PositiveInt = Field(default=1000, description="diffusion steps in training")
    beta_start: float = Field(default=0.0001, gt=0, lt=1, description="first beta of the linear schedule")
    beta_end: float = Field(default=0.02, gt=0, lt=1, description="last beta of the linear schedule")
    sample_steps: PositiveInt = Field(default=50, description="DDIM steps")
    sample_count: PositiveInt = Field(default=64, description="images in a sample grid")
    eval_samples: Int = Field(
        default=500, ge=2, le=LARGEST_EXACT, description="images drawn for an evaluation"
    )
    features: Literal["classifier", "inception"] = Field(
        default="classifier", description="feature network of the quality measures"
    )

    def faults(self) -> list[str]:
        """Return one line per conflict between these settings."""
        faults = []
        if self.beta_start > self.beta_end:
            faults.append(
                f"beta-start: {self.beta_start} is above beta-end ({self.beta_end}); betas rise to beta-end"
            )
        if self.sample_steps > self.timesteps:
            faults.append(
                f"sample-steps: {self.sample_steps} is more than timesteps ({self.timesteps}); "
                f"set it to at most {self.timesteps}"
            )
        return faults
