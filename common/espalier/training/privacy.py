"""Settings of differential privacy, and the names under which clients report the epsilon they have spent."""

from __future__ import annotations

from pydantic import Field

from espalier.config.fields import NonNegative, SettingsGroup

#: Metrics of a ClientReport that hold the spent epsilon.
EPSILON = {"dp-sgd": "epsilon-dp-sgd", "update": "epsilon-update"}


class PrivacySettings(SettingsGroup):
    """What is noised; each part is off at 0."""

    histogram_epsilon: NonNegative = Field(
        default=0.0, description="epsilon of the Laplace noise on label histograms; 0: exact counts"
    )
    dp_sgd_noise: NonNegative = Field(
        default=0.0,
        description="DP-SGD: noise multiplier; an image's gradient is clipped to clip-norm; 0: off",
    )
    dp_sgd_epsilon: NonNegative = Field(
        default=0.0,
        description="DP-SGD: instead of dp-sgd-noise, the epsilon of the whole run, to which clients fit their noise",
    )
    update_clip: NonNegative = Field(
        default=0.0, description="largest L2 norm of a client's update; 0: no clipping"
    )
    update_noise: NonNegative = Field(
        default=0.0, description="Gaussian noise on a client's update, as a multiple of update-clip; 0: off"
    )

    @property
    def dp_sgd(self) -> bool:
        """Whether clients train with DP-SGD."""
        return self.dp_sgd_noise > 0 or self.dp_sgd_epsilon > 0

    @property
    def private(self) -> bool:
        """Whether training is differentially private, by DP-SGD or noisy updates; label histograms do not count."""
        return self.dp_sgd or self.update_noise > 0


class DeltaSettings(SettingsGroup):
    """The delta of reported guarantees."""

    dp_delta: float = Field(default=1e-5, gt=0, lt=1, description="delta that epsilons are reported for")
