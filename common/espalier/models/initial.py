"""The model a run starts from: the same for everybody who has the run's settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from espalier.config.run_settings import RunSettings
from espalier.errors import ConfigError
from espalier.models.presets import MAX_SIZE, MIN_SIZE, PRESETS, Preset, task_of
from espalier.seeds import seed_for

if TYPE_CHECKING:
    from torch import nn


def initial_model(
    settings: RunSettings, image_shape: tuple[int, int, int], classes: int = 0, projection: int = 0
) -> nn.Module:
    """Build the run's network with random weights that depend on the run's seed alone.

    Parameters
    ----------
    settings : RunSettings
        `model` and `seed` are used.
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
        The preset is unknown or does not take such images, or classes or a projection it cannot have.
    """
    import torch

    preset = _checked(settings.model, image_shape, classes)
    channels, _, size = image_shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(settings.seed, "cloud", 0, "initial model"))
        if preset.task == "classification":
            return _classifier(preset, channels, size, classes, projection)
        if projection:
            raise ConfigError(f"model: {settings.model} has no projection head; choose a classifier")
        from espalier.models.unet import unet

        model: nn.Module = unet(settings.model, channels, size)
        return model


def import_ahead(settings: RunSettings) -> None:
    """Import what the run's model will be built with, where that takes long: for a U-Net seconds."""
    if task_of(settings.model) == "diffusion":
        from espalier.diffusers_shim import import_diffusers

        import_diffusers()


def feature_width(settings: RunSettings, image_shape: tuple[int, int, int], classes: int) -> int:
    """Return the length of the features of the run's classifier; nothing is allocated to find out."""
    import torch

    from espalier.models.layers import Classifier

    with torch.device("meta"), torch.no_grad():
        model = initial_model(settings, image_shape, classes).eval()
        if not isinstance(model, Classifier):
            raise ConfigError(f"model: {settings.model} has no features; choose a classifier")
        return int(model.features(torch.empty(1, *image_shape)).shape[1])


def initial_bases(
    settings: RunSettings,
    image_shape: tuple[int, int, int],
    classes: int,
    width: float,
    members: Iterable[int],
    *,
    rescaled: bool = False,
) -> nn.Module:
    """Build an ensemble of independent base networks of the run's model, each with weights of its own.

    Parameters
    ----------
    settings : RunSettings
        `model` and `seed` are used; a base network's weights depend on the seed and its number alone.
    image_shape : tuple of int
        Channels, height, width; height and width must be equal.
    classes : int
        Number of classes.
    width : float
        Width of a base network as a share of the model's, in (0, 1].
    members : iterable of int
        Numbers of the base networks.
    rescaled : bool
        Whether weights start as small as in a network of full width (Split-Mix's rescaled initialisation).

    Raises
    ------
    ConfigError
        As :func:`initial_model`; or the model is no classifier that base networks can be made of.
    """
    import torch

    from espalier.models.architecture import FAMILIES, arguments, describe
    from espalier.models.bases import members as networks_of
    from espalier.models.bases import rescale
    from espalier.models.variants import ensemble

    preset = _checked(settings.model, image_shape, classes)
    channels, _, size = image_shape
    if preset.task != "classification":
        raise ConfigError(f"model: {settings.model} is no classifier; base networks are narrow classifiers")
    with torch.device("meta"):
        whole = _classifier(preset, channels, size, classes, 0)
    spec = ensemble(describe(whole), width, members)
    model = FAMILIES["bases"].construct(arguments(spec))
    for number, network in networks_of(model).items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(settings.seed, "cloud", 0, f"initial base {number}"))
            for module in network.modules():
                if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                    module.reset_parameters()
        if rescaled:
            rescale(network, whole)
    return model.train()


def _checked(name: str, image_shape: tuple[int, int, int], classes: int) -> Preset:
    """Return a preset that takes such images and classes."""
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
    from espalier.models.architecture import FAMILIES

    arguments = {
        **preset.arguments,
        "in_channels": channels,
        "sample_size": size,
        "classes": classes,
        "projection": projection,
    }
    try:
        return FAMILIES[preset.family].construct(arguments)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
