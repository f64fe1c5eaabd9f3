"""Residual networks with pre-activation, which HeteroFL trains at several widths."""

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
    Widths,
    convolution,
    normalisation,
    pooled,
)


class ResNetArguments(ClassifierArguments):
    """Arguments of :class:`PreActResNet`.

    Attributes
    ----------
    widths : list of int
        Channels of the stages; every stage but the first halves the maps.
    blocks : int
        Residual blocks a stage.
    norm : {"none", "batch", "static"}
        Normalisation before each convolution; convolutions have biases only where there is none.
    """

    HIDDEN: ClassVar[tuple[str, ...]] = ("widths", "projection")

    widths: Widths
    blocks: Annotated[int, Field(ge=1, le=8)] = 2
    norm: Norm = "batch"


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after normalisation and ReLU, and a shortcut.

    Where channels or size change, the shortcut is a 1x1 convolution of the same normalised input as
    ``conv1``, so a narrow block reads the same leading channels in both.
    """

    def __init__(self, width_in: int, width: int, stride: int, arguments: ResNetArguments) -> None:
        super().__init__()
        bias = arguments.norm == "none"
        self.scaler = Scaler(arguments.scale)
        self.norm1 = normalisation(arguments.norm, width_in)
        self.conv1 = convolution(width_in, width, stride, bias=bias)
        self.norm2 = normalisation(arguments.norm, width)
        self.conv2 = convolution(width, width, bias=bias)
        self.shortcut: nn.Conv2d | None = None
        # Determined by the stage, not by the widths: narrow and full networks must have the same tensors.
        if stride != 1:
            self.shortcut = nn.Conv2d(width_in, width, 1, stride=stride, bias=bias)

    def forward(self, maps: Tensor) -> Tensor:
        """Return [B, width, H', W'] maps."""
        active = functional.relu(self.norm1(self.scaler(maps)))
        around: Tensor = maps if self.shortcut is None else self.shortcut(active)
        through: Tensor = self.conv2(functional.relu(self.norm2(self.scaler(self.conv1(active)))))
        return around + through


class PreActResNet(SingleHead):
    """A ResNet with pre-activation (He et al., 2016) for small images: 3x3 stem, no initial pooling."""

    Arguments = ResNetArguments

    def __init__(self, arguments: ResNetArguments) -> None:
        super().__init__(arguments)
        width = arguments.widths[0]
        self.conv1 = convolution(arguments.in_channels, width, bias=arguments.norm == "none")
        self._stages: list[str] = []
        for number, wider in enumerate(arguments.widths, 1):
            blocks = []
            for block in range(arguments.blocks):
                stride = 2 if number > 1 and block == 0 else 1
                blocks.append(PreActBlock(width, wider, stride, arguments))
                width = wider
            self._stages.append(f"stage{number}")
            self.add_module(self._stages[-1], nn.Sequential(*blocks))
        self.scaler = Scaler(arguments.scale)
        self.norm = normalisation(arguments.norm, width)
        self.add_head(width, arguments)

    def features(self, images: Tensor) -> Tensor:
        """Return the mean of every map of the last stage, normalised and rectified: [B, widths[-1]]."""
        maps = self.conv1(images)
        for name in self._stages:
            maps = self.get_submodule(name)(maps)
        return pooled(functional.relu(self.norm(self.scaler(maps))))
