"""Small classifiers: logistic regression, fully connected and convolutional networks for any square image."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from espalier.models.layers import (
    ClassifierArguments,
    Norm,
    Scaler,
    SingleHead,
    Width,
    Widths,
    convolution,
    normalisation,
    pooled,
)


class MLPArguments(ClassifierArguments):
    """Arguments of :class:`MLP`; no hidden layer makes it a logistic regression."""

    HIDDEN: ClassVar[tuple[str, ...]] = ("hidden", "projection")

    hidden: Annotated[list[Width], Field(max_length=8)]


class MLP(SingleHead):
    """Fully connected layers ``hidden1``, ``hidden2``, … with ReLU on the flattened pixels."""

    Arguments = MLPArguments

    def __init__(self, arguments: MLPArguments) -> None:
        super().__init__(arguments)
        width = arguments.in_channels * arguments.sample_size**2
        self._layers: list[str] = []
        for number, wider in enumerate(arguments.hidden, 1):
            self._layers.append(f"hidden{number}")
            self.add_module(self._layers[-1], nn.Linear(width, wider))
            width = wider
        self.scaler = Scaler(arguments.scale)
        self.add_head(width, arguments)

    def features(self, images: Tensor) -> Tensor:
        """Return the last hidden layer's activations; the pixels [B, C*H*W] without hidden layers."""
        values = images.flatten(1)
        for name in self._layers:
            values = functional.relu(self.scaler(self.get_submodule(name)(values)))
        return values


class CNNArguments(ClassifierArguments):
    """Arguments of :class:`CNN`.

    Attributes
    ----------
    widths : list of int
        Channels of the convolutions.
    hidden : int
        Width of a fully connected layer on the flattened maps; 0: every map is averaged instead.
    norm : {"none", "batch", "static"}
        Normalisation after each convolution.
    """

    HIDDEN: ClassVar[tuple[str, ...]] = ("widths", "hidden", "projection")

    widths: Widths
    hidden: Annotated[int, Field(ge=0, le=16384)] = 64
    norm: Norm = "none"


class CNN(SingleHead):
    """3x3 convolutions ``conv1``, ``conv2``, …, each with Scaler, normalisation, ReLU and 2x2 max-pooling.

    With ``hidden=0`` and four widths it is HeteroFL's network, which averages over what its last convolution
    sees and therefore does not pool after it. Maps of a single pixel are not pooled further.
    """

    Arguments = CNNArguments

    def __init__(self, arguments: CNNArguments) -> None:
        super().__init__(arguments)
        width, side = arguments.in_channels, arguments.sample_size
        self._pooled: list[bool] = []
        for number, wider in enumerate(arguments.widths, 1):
            self.add_module(f"conv{number}", convolution(width, wider, bias=True))
            self.add_module(f"norm{number}", normalisation(arguments.norm, wider))
            last = number == len(arguments.widths)
            self._pooled.append(side > 1 and not (last and arguments.hidden == 0))
            width, side = wider, side // 2 if self._pooled[-1] else side
        self.scaler = Scaler(arguments.scale)
        self.hidden: nn.Linear | None = None
        if arguments.hidden:
            # Flattened channel by channel, so the first channels' inputs are the first columns of the weight.
            self.hidden = nn.Linear(width * side**2, arguments.hidden)
            width = arguments.hidden
        self.add_head(width, arguments)

    def features(self, images: Tensor) -> Tensor:
        """Return the hidden layer's activations, or the mean of every map."""
        maps = images
        for number, pool in enumerate(self._pooled, 1):
            maps = self.scaler(self.get_submodule(f"conv{number}")(maps))
            maps = functional.relu(self.get_submodule(f"norm{number}")(maps))
            maps = functional.max_pool2d(maps, 2) if pool else maps
        if self.hidden is None:
            return pooled(maps)
        return functional.relu(self.scaler(self.hidden(maps.flatten(1))))
