"""Networks with an exit after every stage; the first stages with their exits are sub-models (DepthFL, InclusiveFL)."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from espalier.models.layers import (
    Classifier,
    ClassifierArguments,
    Headed,
    Norm,
    Scaler,
    Widths,
    convolution,
    mean_logits,
    normalisation,
    pooled,
)


class ExitsArguments(ClassifierArguments):
    """Arguments of :class:`ExitNetwork`.

    Attributes
    ----------
    widths : list of int
        Channels of all stages of the full network, also those beyond `depth`: every exit ends at the last width.
    blocks : int
        Blocks per stage.
    block : {"residual", "plain"}
        A residual block of two convolutions (after a stem), or one convolution.
    depth : int
        Number of stages and exits of this network, the first ones of the full network.
    exits : {"all", "last"}
        Whether every stage has an exit, or only the last one (InclusiveFL).
    norm : {"none", "batch", "static"}
        Normalisation after each convolution; convolutions have biases only without it.
    """

    HIDDEN: ClassVar[tuple[str, ...]] = ("widths", "projection")

    widths: Widths
    blocks: Annotated[int, Field(ge=1, le=8)] = 2
    block: Literal["residual", "plain"] = "residual"
    depth: Annotated[int, Field(ge=1, le=8)]
    exits: Literal["all", "last"] = "all"
    norm: Norm = "batch"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.depth > len(self.widths):
            raise ValueError(f"depth {self.depth} of {len(self.widths)} stages")
        return self

    def convolution(self, width_in: int, width: int, stride: int = 1) -> list[nn.Module]:
        """Return a 3x3 convolution, Scaler and normalisation."""
        conv = convolution(width_in, width, stride, bias=self.norm == "none")
        return [conv, Scaler(self.scale), normalisation(self.norm, width)]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut, and ReLU after the sum."""

    def __init__(self, width_in: int, width: int, stride: int, arguments: ExitsArguments) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *arguments.convolution(width_in, width, stride),
            nn.ReLU(),
            *arguments.convolution(width, width),
        )
        # Determined by the stage, not by the widths: narrow and full networks must have the same tensors.
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride=stride, bias=arguments.norm == "none"),
                Scaler(arguments.scale),
                normalisation(arguments.norm, width),
            )

    def forward(self, maps: Tensor) -> Tensor:
        """Return [B, width, H', W'] maps."""
        return functional.relu(self.body(maps) + self.shortcut(maps))


def separable(width_in: int, width: int, arguments: ExitsArguments) -> nn.Sequential:
    """Return two depthwise separable convolutions that halve the maps and have `width` output channels."""
    bias = arguments.norm == "none"

    def one(out: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(width_in, width_in, 3, stride=stride, padding=1, groups=width_in, bias=bias),
            nn.Conv2d(width_in, out, 1, bias=bias),
            Scaler(arguments.scale),
            normalisation(arguments.norm, out),
            nn.ReLU(),
        ]

    return nn.Sequential(*one(width_in, 2), *one(width, 1))


class Exit(Headed):
    """Maps a stage's feature maps to logits.

    All exits of the full network but the last apply an attention gate to the maps and pass them through
    separable bottlenecks to the width of the last stage (Kim et al., 2023, after Zhang et al., 2019).
    """

    def __init__(self, stage: int, arguments: ExitsArguments) -> None:
        super().__init__()
        widths = arguments.widths[stage - 1 :]
        self.gate: nn.Module | None = None
        if len(widths) > 1:
            width = widths[0]
            self.gate = nn.Sequential(
                separable(width, width, arguments), normalisation(arguments.norm, width), nn.ReLU()
            )
        self.bottlenecks = nn.Sequential(*(separable(a, b, arguments) for a, b in pairwise(widths)))
        self.add_head(widths[-1], arguments)

    def features(self, maps: Tensor) -> Tensor:
        """Return [B, widths[-1]] features of a stage's maps."""
        if self.gate is not None:
            gate = functional.interpolate(
                self.gate(maps), size=maps.shape[-2:], mode="bilinear", align_corners=False
            )
            maps = maps * torch.sigmoid(gate)
        return pooled(self.bottlenecks(maps))

    def forward(self, maps: Tensor) -> Tensor:
        """Return logits [B, classes]."""
        return self.logits(self.features(maps))


class ExitNetwork(Classifier):
    """Stages ``stage1``, ``stage2``, … with an exit ``exit1``, ``exit2``, … after each.

    In training it returns the list of the exits' logits in order of depth; in evaluation their mean.
    The tensors of a network of depth d are those of the full network's stages and exits up to d.
    """

    Arguments = ExitsArguments

    def __init__(self, arguments: ExitsArguments) -> None:
        super().__init__(arguments, arguments.in_channels, arguments.sample_size, arguments.classes)
        self.depth = arguments.depth
        width = arguments.in_channels
        self.stem: nn.Module = nn.Identity()
        if arguments.block == "residual":
            self.stem = nn.Sequential(*arguments.convolution(width, arguments.widths[0]), nn.ReLU())
            width = arguments.widths[0]
        for number, wider in enumerate(arguments.widths[: self.depth], 1):
            layers: list[nn.Module] = []
            for block in range(arguments.blocks):
                stride = 2 if number > 1 and block == 0 else 1
                if arguments.block == "residual":
                    layers.append(ResidualBlock(width, wider, stride, arguments))
                else:
                    layers += [*arguments.convolution(width, wider, stride), nn.ReLU()]
                width = wider
            self.add_module(f"stage{number}", nn.Sequential(*layers))
            if arguments.exits == "all" or number == self.depth:
                self.add_module(f"exit{number}", Exit(number, arguments))

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the maps of every stage, [B, widths[i], H_i, W_i]."""
        maps, stages = self.stem(images), []
        for number in range(1, self.depth + 1):
            maps = self.get_submodule(f"stage{number}")(maps)
            stages.append(maps)
        return stages

    def exits(self, images: Tensor) -> list[Tensor]:
        """Return every exit's logits [B, classes], in order of depth, in training and in evaluation."""
        maps = dict(enumerate(self.maps(images), 1))
        return [self.exit(n)(m) for n, m in maps.items() if hasattr(self, f"exit{n}")]

    def exit(self, number: int) -> Exit:
        """Return an exit, counted from 1."""
        return cast(Exit, self.get_submodule(f"exit{number}"))

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Return the exits' logits in training, their mean [B, classes] in evaluation."""
        logits = self.exits(images)
        return logits if self.training else mean_logits(logits)

    def features(self, images: Tensor) -> Tensor:
        """Return the features of the deepest exit, [B, widths[-1]]."""
        return self.exit(self.depth).features(self.maps(images)[-1])

    def project(self, images: Tensor) -> Tensor:
        """Return the deepest exit's z, [B, projection]; its features without a projection head."""
        return cast(Tensor, self.exit(self.depth).projection(self.features(images)))
