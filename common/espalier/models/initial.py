"""The initial model of a run: the same for all nodes with the run's settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import nn

from espalier.diffusers_shim import import_diffusers
from espalier.errors import ConfigError
from espalier.models.architecture import FAMILIES, arguments, describe
from espalier.models.bases import members as networks_of
from espalier.models.bases import rescale
from espalier.models.layers import Classifier
from espalier.models.presets import MAX_SIZE, MIN_SIZE, PRESETS, Preset, task_of
from espalier.models.unet import unet
from espalier.models.variants import ensemble
from espalier.seeds import seed_for


class ModelSettings(Protocol):
    """The settings that determine an initial model; those of a run have them."""

    @property
    def model(self) -> str: ...  # noqa: D102

    @property
    def seed(self) -> int: ...  # noqa: D102


def initial_model(
    settings: ModelSettings, image_shape: tuple[int, int, int], classes: int = 0, projection: int = 0
) -> nn.Module:
    """Build the run's network with random weights that depend only on the run's seed.

    Parameters
    ----------
    settings : ModelSettings
        Name of the preset, and the run's seed.
    image_shape : tuple of int
        Channels, height, width; height and width must be equal.
    classes : int
        Number of classes; a diffusion model does not need it.
    projection : int
        Width of a classifier's projection head (MOON); 0: none.

    Returns
    -------
    nn.Module
        On the CPU, in float32, in training mode.

    Raises
    ------
    ConfigError
        The preset is unknown, or does not support such images, classes or a projection head.
    """
    preset = _supported(settings.model, image_shape, classes)
    channels, _, size = image_shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(settings.seed, "cloud", 0, "initial model"))
        if preset.task == "classification":
            return _classifier(preset, channels, size, classes, projection)
        if projection:
            raise ConfigError(f"model: {settings.model} has no projection head; choose a classifier")
        model: nn.Module = unet(settings.model, channels, size)
        return model


def import_ahead(settings: ModelSettings) -> None:
    """Import the library of the run's model in advance; diffusers takes seconds."""
    if task_of(settings.model) == "diffusion":
        import_diffusers()


def feature_width(settings: ModelSettings, image_shape: tuple[int, int, int], classes: int) -> int:
    """Return the length of the features of the run's classifier, computed on ``meta``, without allocating memory."""
    with torch.device("meta"), torch.no_grad():
        model = initial_model(settings, image_shape, classes).eval()
        if not isinstance(model, Classifier):
            raise ConfigError(f"model: {settings.model} has no features; choose a classifier")
        return int(model.features(torch.empty(1, *image_shape)).shape[1])


def initial_bases(
    settings: ModelSettings,
    image_shape: tuple[int, int, int],
    classes: int,
    width: float,
    members: Iterable[int],
    *,
    rescaled: bool = False,
) -> nn.Module:
    """Build an ensemble of independent base networks of the run's model, each with its own weights.

    Parameters
    ----------
    settings : ModelSettings
        Name of the preset, and the run's seed; a base network's weights depend only on the seed and its number.
    image_shape : tuple of int
        Channels, height, width; height and width must be equal.
    classes : int
        Number of classes.
    width : float
        Width of a base network as a share of the model's, in (0, 1].
    members : iterable of int
        Numbers of the base networks.
    rescaled : bool
        Whether initial weights have the magnitude of those in the full network (Split-Mix's rescaled initialisation).

    Raises
    ------
    ConfigError
        As :func:`initial_model`; or the model is not a classifier of which base networks can be made.
    """
    preset = _supported(settings.model, image_shape, classes)
    channels, _, size = image_shape
    if preset.task != "classification":
        raise ConfigError(
            f"model: {settings.model} is not a classifier; base networks are narrow classifiers"
        )
    with torch.device("meta"):
        full = _classifier(preset, channels, size, classes, 0)
    spec = ensemble(describe(full), width, members)
    model = FAMILIES["bases"].construct(arguments(spec))
    for number, network in networks_of(model).items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(settings.seed, "cloud", 0, f"initial base {number}"))
            for module in network.modules():
                if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                    module.reset_parameters()
        if rescaled:
            rescale(network, full)
    return model.train()


def _supported(name: str, image_shape: tuple[int, int, int], classes: int) -> Preset:
    """Return a preset after checking that it supports the images and classes."""
    if name not in PRESETS:
        raise ConfigError(f"model: {name!r} is unknown; known models are {', '.join(PRESETS)}")
    channels, height, width = image_shape
    if height != width:
        raise ConfigError(f"model={name} takes square images, these are {height}x{width}; set a size")
    if PRESETS[name].task == "classification":
        if channels < 1:
            raise ConfigError(f"model: images need at least one channel, not {channels}")
        if not MIN_SIZE <= width <= MAX_SIZE:
            raise ConfigError(
                f"model: {name} takes images of {MIN_SIZE} to {MAX_SIZE} pixels, not {width}; resize the images"
            )
        if classes < 2:
            raise ConfigError(f"model: {name} is a classifier and needs at least 2 classes, not {classes}")
    return PRESETS[name]


def _classifier(preset: Preset, channels: int, size: int, classes: int, projection: int) -> nn.Module:
    given = {
        **preset.arguments,
        "in_channels": channels,
        "sample_size": size,
        "classes": classes,
        "projection": projection,
    }
    try:
        return FAMILIES[preset.family].construct(given)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
