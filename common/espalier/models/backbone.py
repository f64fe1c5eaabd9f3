"""Heterogeneous classifiers with features of equal width, which clients can compare without sharing weights."""

from __future__ import annotations

from typing import Annotated, NoReturn, cast

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from espalier.errors import ConfigError
from espalier.models.bodies import Network, body
from espalier.models.layers import ClassifierArguments, SingleHead


class BackboneArguments(ClassifierArguments):
    """Arguments of :class:`Backbone`.

    Attributes
    ----------
    network : str
        What it is under its last layers, see `espalier.models.bodies`.
    feature_dim : int
        Width of the features, whatever the network's own; 0: the network's own.
    head : int
        Width of a layer with tanh before the output layer (HtFLlib's head of vision transformers); 0: none.
    scale : float
        1: these networks come in one width.
    """

    network: Network
    feature_dim: Annotated[int, Field(ge=0, le=16384)] = 512
    head: Annotated[int, Field(ge=0, le=16384)] = 0
    scale: Annotated[float, Field(ge=1, le=1)] = 1.0

    def narrowed(self, rate: float, *, scaler: bool) -> NoReturn:
        """Refuse: the widths of these networks are fixed.

        Raises
        ------
        ConfigError
            Always.
        """
        raise ConfigError(f"model: {self.network} has a fixed width; choose cnn, cnn-bn or mlp")


class Backbone(SingleHead):
    """One of `espalier.models.bodies`, a layer that brings its features to a common width, and an output layer.

    As in HtFLlib an adaptive average pooling along the features stands where the network had its last layer: of
    2048 features each four neighbours are averaged into one of 512, of 64 each is repeated eight times.
    """

    Arguments = BackboneArguments

    def __init__(self, arguments: BackboneArguments) -> None:
        super().__init__(arguments)
        self.body, width = body(arguments.network, arguments.in_channels, arguments.sample_size)
        self.width = arguments.feature_dim or width
        self.head: nn.Linear | None = None
        if arguments.head:
            self.head = nn.Linear(arguments.projection or self.width, arguments.head)
        self.add_head(self.width, arguments)
        if arguments.head:
            self.classifier = nn.Linear(arguments.head, arguments.classes)

    def features(self, images: Tensor) -> Tensor:
        """Return [B, feature_dim] features of float32 [B, C, H, W] images in [-1, 1]."""
        values = cast(Tensor, self.body(images))
        if values.shape[1] == self.width:
            return values
        return functional.adaptive_avg_pool1d(values, self.width)

    def logits(self, features: Tensor) -> Tensor:
        """Return logits [B, classes] of features [B, feature_dim]."""
        values = self.projection(features)
        if self.head is not None:
            values = self.head(values).tanh()
        return cast(Tensor, self.classifier(values))
