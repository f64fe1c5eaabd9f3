"""What an architecture family is, and how every classifier fits that mould."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from espalier.models.checks import prove, validated
from espalier.models.layers import Classifier


@dataclass(frozen=True)
class Family:
    """How one kind of network is described and rebuilt.

    Attributes
    ----------
    matches : callable
        Whether a module is of this family.
    config : callable
        The constructor arguments of a module, as JSON values.
    construct : callable
        The unpruned module of such arguments; raises ValueError where they make no sense. Called under
        ``meta``.
    settle : callable
        Bring what a family keeps beside its tensors (channel counts of blocks, heads) in line with the
        tensors' new shapes; raises ValueError where they make no sense.
    prove : callable
        Run the module once on ``meta``; raises ValueError where its layers do not fit together.
    heads : callable
        Heads of every attention layer, by module path.
    inputs : callable
        Inputs on ``meta`` of one forward pass for one image of the network's own size; raises ValueError
        where it has none.
    """

    matches: Callable[[nn.Module], bool]
    config: Callable[[nn.Module], dict[str, Any]]
    construct: Callable[[dict[str, Any]], nn.Module]
    settle: Callable[[nn.Module, Mapping[str, int]], None]
    prove: Callable[[nn.Module], None]
    heads: Callable[[nn.Module], dict[str, int]]
    inputs: Callable[[nn.Module], tuple[Tensor, ...]]


def classifier_family(name: str, kind: type[Classifier]) -> Family:
    """Return the family of one kind of classifier, whose arguments say everything but its widths.

    Parameters
    ----------
    name : str
        The family's name, for messages.
    kind : type
        The classifier; constructed with its checked ``Arguments``.
    """

    def construct(arguments: dict[str, Any]) -> nn.Module:
        checked = validated(kind.Arguments, arguments, name)
        return cast(Callable[[Any], nn.Module], kind)(checked)

    return Family(
        matches=lambda model: type(model) is kind,
        config=lambda model: cast(Classifier, model).arguments.model_dump(),
        construct=construct,
        settle=_settle,
        prove=_prove,
        heads=lambda model: {},
        inputs=_inputs,
    )


def _inputs(model: nn.Module) -> tuple[Tensor, ...]:
    network = cast(Classifier, model)
    shape = (1, network.in_channels, network.sample_size, network.sample_size)
    return (torch.empty(shape, device="meta"),)


def _settle(model: nn.Module, heads: Mapping[str, int]) -> None:
    if heads:
        raise ValueError(f"attention {min(heads)!r} is no part of the network")


def _prove(model: nn.Module) -> None:
    network = cast(Classifier, model.eval())
    (image,) = _inputs(network)
    prove(network, lambda: cast(Tensor, network(image)), tuple(image.shape), (1, network.classes))
