"""A small StyleGAN-like generator for 8 to 64 pixels, and its discriminator, trained on one CPU core in minutes."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

SMALLEST, LARGEST = 8, 64
GROUP = 4
"""Size of the groups over which the discriminator computes the standard deviation; its images are N / GROUP apart."""


@dataclass(frozen=True)
class GanConfig:
    """Shape of a generator and its discriminator.

    Attributes
    ----------
    size : int
        Height and width of its images, in pixels: a base of 4 to 7 doubled once to four times.
    channels : int
        1 (grey) or 3 (RGB).
    classes : int
        Number of classes of the training data; a latent is drawn for a random class, as in StyleGAN-XL.
    latent_dim : int
        Length of z and of w.
    width : int
        Product of feature maps and side length, about constant over resolutions.
    """

    size: int
    channels: int
    classes: int
    latent_dim: int = 128
    width: int = 512

    def __post_init__(self) -> None:
        if self.size != native_size(self.size):
            raise ValueError(f"no generator has images of {self.size} pixels")
        if self.channels not in (1, 3) or min(self.classes, self.latent_dim, self.width) < 1:
            raise ValueError("channels must be 1 or 3, and classes, latent_dim and width positive")

    @property
    def sides(self) -> tuple[int, ...]:
        """Side length in pixels at each resolution, in ascending order."""
        sides = [self.size]
        while sides[0] > 7:
            sides.insert(0, sides[0] // 2)
        return tuple(sides)

    def maps(self, side: int) -> int:
        """Return the number of feature maps at a resolution."""
        return min(128, max(16, self.width // side // 8 * 8))


def native_size(size: int) -> int:
    """Return the image size of a generator for data of `size` pixels: the next larger size that it supports."""
    size = min(max(size, SMALLEST), LARGEST)
    doublings = math.floor(math.log2(size / 4))
    step: int = 2**doublings
    return math.ceil(size / step) * step


class Dense(nn.Module):
    """A fully connected layer; weights of unit variance, scaled by 1/sqrt(fan-in) when used.

    That is the equalised learning rate (Karras et al. 2018, arXiv 1710.10196, section 4.1), which
    equalises Adam's updates over layers. The convolutions below use it, too.
    """

    def __init__(self, inputs: int, outputs: int, rng: torch.Generator, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, generator=rng))
        self.bias = nn.Parameter(torch.full((outputs,), bias))
        self.scale = 1 / math.sqrt(inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs] to [N, outputs]."""
        return functional.linear(x, self.weight * self.scale, self.bias)


class Conv(nn.Module):
    """A 3x3 convolution that preserves the size, or a 4x4 convolution that halves it."""

    def __init__(self, inputs: int, outputs: int, rng: torch.Generator, *, halve: bool = False) -> None:
        super().__init__()
        side = 4 if halve else 3
        self.weight = nn.Parameter(torch.randn(outputs, inputs, side, side, generator=rng))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = 1 / math.sqrt(inputs * side * side)
        self.stride = 2 if halve else 1

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, S, S] to [N, outputs, S, S] or [N, outputs, S/2, S/2]."""
        return functional.conv2d(x, self.weight * self.scale, self.bias, self.stride, padding=1)


class StyledConv(nn.Module):
    """A convolution modulated by w and demodulated (Karras et al. 2020, arXiv 1912.04958, section 2.2).

    Inputs and outputs are scaled instead of the weights, which is equivalent and needs one set of weights for the
    batch. The kernel is 3x3, or 4x4 with stride 2 to double the size, where each output pixel uses 2x2 weights.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        latent: int,
        rng: torch.Generator,
        *,
        double: bool = False,
        demodulate: bool = True,
    ) -> None:
        super().__init__()
        shape = (inputs, outputs, 4, 4) if double else (outputs, inputs, 3, 3)
        self.weight = nn.Parameter(torch.randn(shape, generator=rng))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.style = Dense(latent, inputs, rng, bias=1.0)
        self.scale = 1 / math.sqrt(inputs * (4 if double else 9))
        self.doubles, self.demodulates = double, demodulate

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Map [N, inputs, S, S] and [N, latent] to [N, outputs, S, S] or [N, outputs, 2S, 2S]."""
        weight, style = self.weight * self.scale, self.style(w)
        x = x * style[:, :, None, None]
        if self.doubles:
            x = functional.conv_transpose2d(x, weight, stride=2, padding=1)
        else:
            x = functional.conv2d(x, weight, padding=1)
        if self.demodulates:
            power = weight.square().sum((2, 3))
            power = power / 4 if self.doubles else power.T
            x = x * torch.rsqrt(style.square() @ power + 1e-8)[:, :, None, None]
        return x + self.bias[:, None, None]


class Mapping(nn.Module):
    """Maps noise z and a class to the style vector w."""

    def __init__(self, config: GanConfig, rng: torch.Generator) -> None:
        super().__init__()
        width = config.latent_dim
        self.embedding = nn.Parameter(torch.randn(config.classes, width, generator=rng))
        self.layers = nn.ModuleList(
            [Dense(2 * width, width, rng), Dense(width, width, rng), Dense(width, width, rng)]
        )

    def forward(self, z: Tensor, classes: Tensor) -> Tensor:
        """Map [N, latent] and class numbers [N] to w, [N, latent]."""
        x = torch.cat((_normalise(z), _normalise(self.embedding[classes])), 1)
        for layer in self.layers:
            x = _leaky(layer(x))
        return x


class Synthesis(nn.Module):
    """Maps w to an image by styled convolutions of a learned constant.

    StyleGAN's noise inputs are omitted: images of these sizes have no fine texture that needs them, and without them
    the image is a function of w.
    """

    def __init__(self, config: GanConfig, rng: torch.Generator) -> None:
        super().__init__()
        sides, latent = config.sides, config.latent_dim
        maps = [config.maps(side) for side in sides]
        self.constant = nn.Parameter(torch.randn(1, maps[0], sides[0], sides[0], generator=rng))
        self.first = StyledConv(maps[0], maps[0], latent, rng)
        self.doubling = nn.ModuleList(
            StyledConv(a, b, latent, rng, double=True) for a, b in itertools.pairwise(maps)
        )
        self.last = StyledConv(maps[-1], config.channels, latent, rng, demodulate=False)

    def forward(self, w: Tensor) -> Tensor:
        """Map [N, latent] to images [N, channels, size, size] in (-1, 1)."""
        x = _leaky(self.first(self.constant.expand(len(w), -1, -1, -1), w))
        for layer in self.doubling:
            x = _leaky(layer(x, w))
        return torch.tanh(self.last(x, w))


class StyleGenerator(nn.Module):
    """The generator: mapping and synthesis.

    Parameters
    ----------
    config : GanConfig
        Shape of the network.
    rng : torch.Generator
        Draws the initial weights.
    """

    def __init__(self, config: GanConfig, rng: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.mapping = Mapping(config, rng)
        self.synthesis = Synthesis(config, rng)

    def forward(self, z: Tensor, classes: Tensor) -> Tensor:
        """Draw one image for each z, [N, latent], and class number, [N]."""
        images: Tensor = self.synthesis(self.mapping(z, classes))
        return images


class Discriminator(nn.Module):
    """Distinguishes real from generated images given the class (projection: Miyato and Koyama 2018)."""

    def __init__(self, config: GanConfig, rng: torch.Generator) -> None:
        super().__init__()
        sides = config.sides[::-1]
        maps = [config.maps(side) for side in sides]
        self.first = Conv(config.channels, maps[0], rng)
        self.halving = nn.ModuleList(Conv(a, b, rng, halve=True) for a, b in itertools.pairwise(maps))
        self.last = Conv(maps[-1] + 1, maps[-1], rng)
        self.dense = Dense(maps[-1] * sides[-1] ** 2, 128, rng)
        self.out = Dense(128, 1, rng)
        self.embedding = nn.Parameter(torch.randn(config.classes, 128, generator=rng))

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        """Map images [N, channels, size, size] and class numbers [N] to logits [N]; high means real."""
        x = _leaky(self.first(images))
        for layer in self.halving:
            x = _leaky(layer(x))
        x = _leaky(self.last(torch.cat((x, _group_deviation(x)), 1)))
        x = _leaky(self.dense(x.flatten(1)))
        matched = (x * self.embedding[classes]).sum(1) / math.sqrt(x.shape[1])
        logits: Tensor = self.out(x)[:, 0] + matched
        return logits


def _leaky(x: Tensor) -> Tensor:
    """Leaky ReLU, scaled to preserve the variance."""
    return functional.leaky_relu(x, 0.2) * math.sqrt(2)


def _normalise(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


def _group_deviation(x: Tensor) -> Tensor:
    """Return a map with the mean standard deviation within each group of images (Karras et al. 2018, section 3)."""
    count, _, height, width = x.shape
    group = GROUP if count % GROUP == 0 else count
    apart = x.reshape(group, count // group, -1)
    # Faster than torch.var over the first dimension, which took an eighth of a step.
    variance = (apart - apart.mean(0)).square().mean(0)
    spread = (variance + 1e-8).sqrt().mean(1)
    return spread.repeat(group)[:, None, None, None].expand(-1, 1, height, width)
