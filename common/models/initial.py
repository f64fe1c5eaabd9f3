"""The model a run starts from: the same for everybody who has the run's settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.run.config import RunConfig
from common.seeds import seed_for

if TYPE_CHECKING:
    from torch import nn


def initial_model(settings: RunConfig, image_shape: tuple[int, int, int]) -> nn.Module:
    """Build the run's network with random weights that depend on the run's seed alone.

    Parameters
    ----------
    settings : RunConfig
        `model` and `seed` are used.
    image_shape : tuple of int
        Channels, height, width; height and width must be equal.

    Raises
    ------
    ConfigError
        If the preset is unknown or the images are not square.
    """
    import torch

    from common.errors import ConfigError
    from common.models.unet import unet

    channels, height, width = image_shape
    if height != width:
        raise ConfigError(
            f"model={settings.model} takes square images, these are {height}x{width}; set a size"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(settings.seed, "cloud", 0, "initial model"))
        model: nn.Module = unet(settings.model, channels, height)
    return model
