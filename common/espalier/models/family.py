"""Architecture families: how a kind of network is described and rebuilt; the family of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from espalier.models.checks import validated, verify_layers
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
        The unpruned module of such arguments; raises ValueError if they are invalid. Called under
        ``meta``.
    set_sizes : callable
        Set the sizes that modules store besides their tensors (channel counts of blocks, heads) to those of the
        tensors' shapes; raises ValueError if they are invalid.
    verify : callable
        Run the module once on ``meta``; raises ValueError if its layers do not match.
    heads : callable
        Heads of every attention layer, by module path.
    inputs : callable
        Inputs on ``meta`` of one forward pass for one image of the network's size; raises ValueError if
        it has none.
    """

    matches: Callable[[nn.Module], bool]
    config: Callable[[nn.Module], dict[str, Any]]
    construct: Callable[[dict[str, Any]], nn.Module]
    set_sizes: Callable[[nn.Module, Mapping[str, int]], None]
    verify: Callable[[nn.Module], None]
    heads: Callable[[nn.Module], dict[str, int]]
    inputs: Callable[[nn.Module], tuple[Tensor, ...]]


def classifier_family(name: str, kind: type[Classifier]) -> Family:
    """Return the family of one kind of classifier, whose arguments determine everything but its widths.

    Parameters
    ----------
    name : str
        The family's name, for messages.
    kind : type
        The classifier; constructed with its validated ``Arguments``.
    """

    def construct(arguments: dict[str, Any]) -> nn.Module:
        checked = validated(kind.Arguments, arguments, name)
        return cast(Callable[[Any], nn.Module], kind)(checked)

    return Family(
        matches=lambda model: type(model) is kind,
        config=lambda model: cast(Classifier, model).arguments.model_dump(),
        construct=construct,
        set_sizes=_set_sizes,
        verify=_verify,
        heads=lambda model: {},
        inputs=_inputs,
    )


def _inputs(model: nn.Module) -> tuple[Tensor, ...]:
    network = cast(Classifier, model)
    shape = (1, network.in_channels, network.sample_size, network.sample_size)
    return (torch.empty(shape, device="meta"),)


def _set_sizes(model: nn.Module, heads: Mapping[str, int]) -> None:
    if heads:
        raise ValueError(f"attention {min(heads)!r} is not part of the network")


def _verify(model: nn.Module) -> None:
    network = cast(Classifier, model.eval())
    (image,) = _inputs(network)
    verify_layers(network, lambda: cast(Tensor, network(image)), tuple(image.shape), (1, network.classes))
