"""Ensembles of independent, narrow base networks; a client trains as many as its capacity allows (Split-Mix)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from espalier.models.checks import validated
from espalier.models.classifiers import CNN, MLP
from espalier.models.layers import Classifier, SingleHead, mean_logits
from espalier.models.resnet import PreActResNet

FAMILIES: Mapping[str, type[SingleHead]] = {"mlp": MLP, "cnn": CNN, "resnet": PreActResNet}
"""The families of base networks."""


class BasesArguments(BaseModel):
    """Arguments of :class:`Bases`.

    Attributes
    ----------
    family : {"mlp", "cnn", "resnet"}
        What the base networks are.
    base : dict
        The family's arguments of one base network.
    members : list of int
        Numbers of the base networks that are here, each once.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    family: Literal["mlp", "cnn", "resnet"]
    base: dict[str, Any]
    members: Annotated[list[Annotated[int, Field(ge=0, le=4095)]], Field(min_length=1, max_length=64)]

    @field_validator("members")
    @classmethod
    def _each_once(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("a base network is repeated")
        return value


class Bases(Classifier):
    """Base networks ``base0``, ``base3``, …, each with its own output layer.

    In training it returns the list of the members' logits, in their order; in evaluation their mean.
    """

    Arguments = BasesArguments

    def __init__(self, arguments: BasesArguments) -> None:
        kind = FAMILIES[arguments.family]
        base = validated(kind.Arguments, arguments.base, arguments.family)
        networks = [kind(cast(Any, base)) for _ in arguments.members]
        first = networks[0]
        super().__init__(arguments, first.in_channels, first.sample_size, first.classes)
        self.members = list(arguments.members)
        for number, network in zip(self.members, networks, strict=True):
            self.add_module(f"base{number}", network)

    def networks(self) -> dict[int, SingleHead]:
        """Return the base networks by number."""
        return {n: cast(SingleHead, self.get_submodule(f"base{n}")) for n in self.members}

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Return the members' logits in training, their mean [B, classes] in evaluation."""
        logits = [network(images) for network in self.networks().values()]
        return logits if self.training else mean_logits(logits)

    def features(self, images: Tensor) -> Tensor:
        """Return the members' features concatenated, [B, members * F]."""
        return torch.cat([network.features(images) for network in self.networks().values()], 1)

    def project(self, images: Tensor) -> Tensor:
        """Return the members' z concatenated, [B, members * projection]."""
        return torch.cat([network.project(images) for network in self.networks().values()], 1)


def members(model: nn.Module) -> dict[int, SingleHead]:
    """Return the base networks of an ensemble by number.

    Raises
    ------
    TypeError
        The network is no ensemble of base networks.
    """
    if not isinstance(model, Bases):
        raise TypeError(f"a {type(model).__name__} has no base networks")
    return model.networks()


def rescale(base: nn.Module, whole: nn.Module) -> None:
    """Scale the initial weights of a base network to their magnitude in the full network (Split-Mix).

    torch draws weights and biases of a layer from U(-b, b) with b = 1 / sqrt(fan_in); here fan_in becomes
    the whole network's, which makes them smaller.

    Parameters
    ----------
    base : nn.Module
        A network with torch's initial weights; changed in place.
    whole : nn.Module
        The network it is a narrow version of; only its shapes matter, so it may be on ``meta``.
    """
    layers = dict(whole.named_modules())
    with torch.no_grad():
        for path, module in base.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan = module.weight[0].numel() / cast(Tensor, layers[path].weight)[0].numel()
                module.weight *= fan**0.5
                if module.bias is not None:
                    module.bias *= fan**0.5
