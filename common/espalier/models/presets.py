"""Model presets by name; imports no torch, because settings and edges use it, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Task = Literal["diffusion", "classification"]

#: Smallest and largest image size in pixels that classifiers take.
MIN_SIZE, MAX_SIZE = 8, 224
#: The last layer of every classifier: row i of its weight and bias belongs to class i.
OUTPUT_LAYER = "classifier"
#: Backbones without batch normalisation.
_WITHOUT_NORMALISATION = frozenset({"cnn4", "vit-b-16", "vit-b-32"})


@dataclass(frozen=True)
class Preset:
    """A model preset.

    Attributes
    ----------
    task : {"diffusion", "classification"}
        What the model is trained for.
    family : str
        Its architecture family, a key of `espalier.models.architecture.FAMILIES`.
    description : str
        One-line description.
    arguments : mapping
        The family's arguments that the preset fixes; a U-Net's are in `espalier.models.unet`.
    """

    task: Task
    family: str
    description: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


def _classifier(family: str, description: str, **arguments: Any) -> Preset:
    return Preset("classification", family, description, arguments)


def _backbone(network: str, description: str, **arguments: Any) -> Preset:
    return _classifier("backbone", description, network=network, **arguments)


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
    # Heterogeneous classifiers with 512 features each; espalier.models.families has HtFLlib's mixes of them.
    "cnn4": _backbone(
        "cnn4", "HtFLlib's CNN, two 5x5 convolutions and two layers, 0.9 M parameters at 32 pixels"
    ),
    "resnet4": _backbone("resnet4", "ResNet of one basic block, 0.1 M parameters"),
    "resnet6": _backbone("resnet6", "ResNet of two basic blocks, 0.3 M parameters"),
    "resnet8": _backbone("resnet8", "ResNet of three basic blocks, 1.2 M parameters"),
    "resnet10": _backbone("resnet10", "ResNet of four basic blocks, 4.9 M parameters"),
    "resnet18": _backbone("resnet18", "ResNet-18, 11.2 M parameters"),
    "resnet34": _backbone("resnet34", "ResNet-34, 21.3 M parameters"),
    "resnet50": _backbone("resnet50", "ResNet-50, 23.5 M parameters"),
    "resnet101": _backbone("resnet101", "ResNet-101, 42.5 M parameters"),
    "resnet152": _backbone("resnet152", "ResNet-152, 58.1 M parameters"),
    "googlenet": _backbone("googlenet", "GoogLeNet without auxiliary outputs, 5.6 M parameters"),
    "mobilenet-v2": _backbone("mobilenet-v2", "MobileNetV2, 2.2 M parameters"),
    "vit-b-16": _backbone("vit-b-16", "vision transformer ViT-B with patches of about 16 pixels", head=768),
    "vit-b-32": _backbone("vit-b-32", "vision transformer ViT-B with patches of about 32 pixels", head=768),
}

MODELS: Mapping[str, str] = {name: preset.description for name, preset in PRESETS.items()}
"""All names that `-c model=…` accepts, with a one-line description."""


def is_model(name: str) -> bool:
    """Whether a name is that of a preset."""
    return name in PRESETS


def classifiers() -> tuple[str, ...]:
    """Return the names of the classifiers."""
    return tuple(name for name, preset in PRESETS.items() if preset.task == "classification")


def task_of(model: str) -> Task:
    """Return the task of a model.

    Raises
    ------
    KeyError
        The name is not that of a preset; a validated `RunSettings` has none such.
    """
    return PRESETS[model].task


def family_of(model: str) -> str:
    """Return a model's architecture family: "unet", "mlp", "cnn", "resnet", "exits" or "backbone".

    Raises
    ------
    KeyError
        The name is not that of a preset.
    """
    return PRESETS[model].family


def normalises_batches(model: str) -> bool:
    """Whether a model has batch normalisation, which mixes the images of a batch.

    Raises
    ------
    KeyError
        The name is not that of a preset.
    """
    arguments = PRESETS[model].arguments
    if "network" in arguments:
        return arguments["network"] not in _WITHOUT_NORMALISATION
    return bool(arguments.get("norm", "none") != "none")


def is_output_tensor(name: str) -> bool:
    """Whether a classifier's tensor has one row per class, e.g. ``"exit2.classifier.bias"``."""
    return OUTPUT_LAYER in name.split(".")[:-1]
