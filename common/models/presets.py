"""The models a run can name, and what each is for: known without torch, because edges and settings ask too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Task = Literal["diffusion", "classification"]

#: Smallest and largest image size in pixels that classifiers take.
MIN_SIZE, MAX_SIZE = 8, 224
#: The last layer of every classifier: row i of its weight and bias belongs to class i.
OUTPUT_LAYER = "classifier"


@dataclass(frozen=True)
class Preset:
    """What stands behind a model's name.

    Attributes
    ----------
    task : {"diffusion", "classification"}
        What the model is trained for.
    family : str
        Its architecture family, a key of `common.models.architecture.FAMILIES`.
    description : str
        One line for people.
    arguments : mapping
        The family's arguments that the preset settles; a U-Net's are in `common.models.unet`.
    """

    task: Task
    family: str
    description: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


def _classifier(family: str, description: str, **arguments: Any) -> Preset:
    return Preset("classification", family, description, arguments)


PRESETS: Mapping[str, Preset] = {
    "unet-tiny": Preset("diffusion", "unet", "U-Net of 1.1 M parameters for 8-pixel images on one CPU core"),
    "unet-small": Preset("diffusion", "unet", "U-Net of 5.3 M parameters for 28 and 32 pixels"),
    "unet-paper": Preset("diffusion", "unet", "FedPhD's U-Net of 35.8 M parameters"),
    "logistic": _classifier("mlp", "multinomial logistic regression on the pixels", hidden=[]),
    # The network of Power-of-Choice's experiments, without its dropout.
    "mlp": _classifier("mlp", "fully connected network, 64 and 30 hidden units", hidden=[64, 30]),
    "cnn": _classifier(
        "cnn", "two convolutions of 16 and 32 channels, no normalisation", widths=[16, 32], hidden=64
    ),
    "cnn-bn": _classifier(
        "cnn",
        "HeteroFL's four convolutions with batch normalisation, in widths for a CPU",
        widths=[16, 32, 64, 64],
        hidden=0,
        norm="batch",
    ),
    "preact-resnet18": _classifier(
        "resnet",
        "ResNet-18 with pre-activation, 11.2 M parameters",
        widths=[64, 128, 256, 512],
        blocks=2,
        norm="batch",
    ),
    "depth-resnet18": _classifier(
        "exits",
        "DepthFL's ResNet-18 with an exit after each of its four stages",
        widths=[64, 128, 256, 512],
        blocks=2,
        block="residual",
        depth=4,
        norm="batch",
    ),
    "depth-cnn": _classifier(
        "exits",
        "three stages with an exit each, small enough for a CPU",
        widths=[16, 32, 64],
        blocks=1,
        block="plain",
        depth=3,
        norm="batch",
    ),
}

MODELS: Mapping[str, str] = {name: preset.description for name, preset in PRESETS.items()}
"""Every name that `-c model=…` accepts, with one line about it."""


def is_model(name: str) -> bool:
    """Tell whether a name is that of a preset."""
    return name in PRESETS


def task_of(model: str) -> Task:
    """Return what a model is trained for.

    Raises
    ------
    KeyError
        The name is no preset's; a validated `RunConfig` holds none such.
    """
    return PRESETS[model].task


def family_of(model: str) -> str:
    """Return a model's architecture family: "unet", "mlp", "cnn", "resnet" or "exits".

    Raises
    ------
    KeyError
        The name is no preset's.
    """
    return PRESETS[model].family


def is_output_tensor(name: str) -> bool:
    """Tell whether a classifier's tensor has one row per class, e.g. ``"exit2.classifier.bias"``."""
    return OUTPUT_LAYER in name.split(".")[:-1]
