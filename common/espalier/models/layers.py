"""Parts of all classifiers: arguments, normalisation, HeteroFL's Scaler, output layers."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from espalier.models.presets import MAX_SIZE, MIN_SIZE

Width = Annotated[int, Field(ge=1, le=16384)]
Widths = Annotated[list[Width], Field(min_length=1, max_length=8)]
Norm = Literal["none", "batch", "static"]
"""Normalisation of convolutions: none, batch normalisation, or HeteroFL's static one (sBN), without
running statistics."""

#: Prevents that 0.55 * 100 = 55.000000000000007 is rounded up to 56.
_ROUNDING = 1e-9


def narrow_width(width: int, rate: float) -> int:
    """Return ``ceil(rate * width)``, at least 1: the hidden width of a sub-network (HeteroFL, FjORD)."""
    return max(1, math.ceil(rate * width - _ROUNDING))


class ClassifierArguments(BaseModel):
    """Arguments of every classifier with one body; families add their own.

    Attributes
    ----------
    in_channels, sample_size, classes : int
        Image channels, image height and width in pixels, number of classes.
    projection : int
        Output width of a two-layer projection head before the output layer (MOON); 0: no such head.
    scale : float
        HeteroFL's Scaler: in training, the outputs of a layer are divided by it (r_local / r_global).
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    #: Fields that hold hidden widths; a width of 0 means that there is no such layer.
    HIDDEN: ClassVar[tuple[str, ...]] = ("projection",)

    in_channels: Annotated[int, Field(ge=1, le=4096)]
    sample_size: Annotated[int, Field(ge=MIN_SIZE, le=MAX_SIZE)]
    classes: Annotated[int, Field(ge=2, le=100_000)]
    projection: Annotated[int, Field(ge=0, le=16384)] = 0
    scale: Annotated[float, Field(gt=0, le=1)] = 1.0

    def narrowed(self, rate: float, *, scaler: bool) -> Self:
        """Return the arguments of the network whose hidden widths are `rate` of these."""

        def narrow(value: Any) -> Any:
            if isinstance(value, list):
                return [narrow(width) for width in value]
            return narrow_width(value, rate) if value else 0

        changed = {name: narrow(getattr(self, name)) for name in self.HIDDEN}
        return self.model_copy(update=changed | ({"scale": self.scale * rate} if scaler else {}))


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation that also accepts a batch with one value per channel, for which torch's raises.

    Deep layers reduce small images to single pixels, and a client's last batch may have one image. A single value has
    no variance: running statistics, if there are any, are used and not updated; without them the value is its own
    mean, so the output is the shift.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise [B, C, H, W] maps."""
        own = self.training or self.running_mean is None
        if not own or maps.numel() > maps.shape[1]:
            return super().forward(maps)
        if self.running_mean is not None:
            return functional.batch_norm(
                maps, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        shape = (1, -1, 1, 1)
        return (maps - maps) * self.weight.view(shape) + self.bias.view(shape)


def normalisation(kind: Norm, width: int) -> nn.Module:
    """Return a normalisation layer; "none" is the identity, without tensors."""
    if kind == "none":
        return nn.Identity()
    if kind == "static":
        return BatchNorm(width, momentum=None, track_running_stats=False)
    return BatchNorm(width)


class Scaler(nn.Module):
    """HeteroFL's Scaler (Diao et al., 2021): divides by `scale` in training, the identity in evaluation.

    So the outputs of a narrow layer have the magnitude of those of the full layer.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, values: Tensor) -> Tensor:
        """Scale values of any shape."""
        return values / self.scale if self.training and self.scale != 1 else values


def pooled(maps: Tensor) -> Tensor:
    """Return the mean of every feature map, [B, C, H, W] -> [B, C]."""
    return maps.mean((2, 3))


class Headed(nn.Module):
    """A module with an optional projection head and an output layer at its end."""

    projection: nn.Module
    classifier: nn.Linear

    def add_head(self, width: int, arguments: ClassifierArguments) -> None:
        """Add the last layers for features of `width`; call it last, so that they come last in order."""
        out = arguments.projection
        # MOON (Li et al., 2021): width -> width, ReLU, width -> projection; the classifier reads its output.
        self.projection = (
            nn.Sequential(nn.Linear(width, width), Scaler(arguments.scale), nn.ReLU(), nn.Linear(width, out))
            if out
            else nn.Identity()
        )
        self.classifier = nn.Linear(out or width, arguments.classes)

    def logits(self, features: Tensor) -> Tensor:
        """Return logits [B, classes] of features [B, F]."""
        logits: Tensor = self.classifier(self.projection(features))
        return logits


class Classifier(nn.Module):
    """A network from images to logits that can be described and rebuilt from its arguments.

    Parameters
    ----------
    arguments : BaseModel
        Validated arguments.
    in_channels, sample_size, classes : int
        Shapes of input and output: [B, in_channels, sample_size, sample_size] to [B, classes].
    """

    #: Model of the constructor's arguments.
    Arguments: ClassVar[type[BaseModel]]

    def __init__(self, arguments: BaseModel, in_channels: int, sample_size: int, classes: int) -> None:
        super().__init__()
        self.arguments = arguments
        self.in_channels, self.sample_size, self.classes = in_channels, sample_size, classes

    def features(self, images: Tensor) -> Tensor:
        """Return the features: the inputs of the projection head or output layer.

        Parameters
        ----------
        images : Tensor
            float32 [B, in_channels, sample_size, sample_size] in [-1, 1].

        Returns
        -------
        Tensor
            [B, F].
        """
        raise NotImplementedError

    def project(self, images: Tensor) -> Tensor:
        """Return z, [B, projection]: the inputs of the output layer; the features without a projection head."""
        raise NotImplementedError


class SingleHead(Classifier, Headed):
    """A classifier with one body and one output layer."""

    def __init__(self, arguments: ClassifierArguments) -> None:
        super().__init__(arguments, arguments.in_channels, arguments.sample_size, arguments.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, classes] of float32 [B, C, H, W] images in [-1, 1]."""
        return self.logits(self.features(images))

    def project(self, images: Tensor) -> Tensor:
        """Return z, [B, projection]: the inputs of the output layer; the features without a projection head."""
        return cast(Tensor, self.projection(self.features(images)))


def convolution(width_in: int, width_out: int, stride: int = 1, *, bias: bool) -> nn.Conv2d:
    """Return a 3x3 convolution that preserves the size of the maps, or halves it (rounded up) with stride 2."""
    return nn.Conv2d(width_in, width_out, 3, stride=stride, padding=1, bias=bias)


def mean_logits(logits: list[Tensor]) -> Tensor:
    """Return the mean of several networks' or exits' logits, the prediction of an ensemble."""
    return torch.stack(logits).mean(0)
