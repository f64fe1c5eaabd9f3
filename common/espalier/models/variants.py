"""Sub-models of a network as descriptions: narrower, shallower, or some base networks of an ensemble.

Every tensor of a variant is a leading slice of the tensor of the same name in the whole network (of an
ensemble: the very tensor), so a server cuts what it sends from what it holds. All functions are pure: they
build on ``meta`` and draw no random numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch

from espalier.errors import ConfigError
from espalier.models.architecture import FAMILIES, arguments, describe
from espalier.models.bases import FAMILIES as BASE_FAMILIES
from espalier.models.bases import BasesArguments
from espalier.models.exits import ExitsArguments
from espalier.models.layers import Classifier, ClassifierArguments, narrow_width
from espalier_proto import espalier_pb2 as pb

__all__ = ["depth_of", "ensemble", "narrow_width", "narrowed", "shortened", "with_members", "with_norm"]


def narrowed(spec: pb.ArchitectureSpec, rate: float, *, scaler: bool = False) -> pb.ArchitectureSpec:
    """Return the network whose every hidden width h is ``ceil(rate * h)`` (HeteroFL, FjORD).

    Image channels and classes are unchanged.

    Parameters
    ----------
    spec : ArchitectureSpec
        The full network, a classifier with one body.
    rate : float
        Share of the widths, in (0, 1].
    scaler : bool
        Whether the narrow network's layers are scaled in training by 1 / `rate` (HeteroFL's Scaler).

    Raises
    ------
    ConfigError
        The rate is out of range, or the network has a fixed width.
    """
    _check_rate(rate)
    own = _arguments(spec)
    if not isinstance(own, ClassifierArguments):
        raise ConfigError(f"model: a network of the family {spec.family!r} has a fixed width")
    return _rebuilt(spec, own.narrowed(rate, scaler=scaler).model_dump(), slices=True)


def shortened(spec: pb.ArchitectureSpec, depth: int) -> pb.ArchitectureSpec:
    """Return the network of the first `depth` stages and exits (DepthFL, InclusiveFL).

    Raises
    ------
    ConfigError
        The network has no exits, or fewer than that.
    """
    have = depth_of(spec)
    if not 1 <= depth <= have:
        raise ConfigError(f"levels: depth {depth} of a network of {have} stages; give 1 to {have}")
    return _rebuilt(spec, arguments(spec) | {"depth": depth}, slices=True)


def with_last_exit(spec: pb.ArchitectureSpec, depth: int) -> pb.ArchitectureSpec:
    """Return the network of the first `depth` stages and the exit of the last of them (InclusiveFL).

    Raises
    ------
    ConfigError
        The network has no exits, or fewer stages.
    """
    have = depth_of(spec)
    if not 1 <= depth <= have:
        raise ConfigError(f"levels: depth {depth} of a network of {have} stages; give 1 to {have}")
    return _rebuilt(spec, arguments(spec) | {"depth": depth, "exits": "last"}, slices=False)


def depth_of(spec: pb.ArchitectureSpec) -> int:
    """Return the number of stages and exits of a network.

    Raises
    ------
    ConfigError
        It has no exits.
    """
    own = _arguments(spec)
    if not isinstance(own, ExitsArguments):
        raise ConfigError(
            f"model: a network of the family {spec.family!r} comes in one depth only; "
            "depth-cnn and depth-resnet18 have an exit after every stage"
        )
    return own.depth


def ensemble(
    spec: pb.ArchitectureSpec, rate: float, members: Iterable[int], *, scaler: bool = False
) -> pb.ArchitectureSpec:
    """Return the ensemble of base networks, each with `rate` times the widths of a network (Split-Mix).

    Parameters
    ----------
    spec : ArchitectureSpec
        The full network: a classifier of the families mlp, cnn or resnet.
    rate : float
        Width of a base network as a share of the full one's, in (0, 1].
    members : iterable of int
        Numbers of the base networks.
    scaler : bool
        Whether the layers are scaled in training by 1 / `rate`.

    Raises
    ------
    ConfigError
        The rate is out of range, or the network is of another family.
    ValueError
        There are no members or too many, or a member is repeated.
    """
    if spec.family not in BASE_FAMILIES:
        raise ConfigError(
            f"model: base networks are of the families {', '.join(BASE_FAMILIES)}, not {spec.family}"
        )
    _check_rate(rate)
    own = cast(ClassifierArguments, _arguments(spec))
    config = {
        "family": spec.family,
        "base": own.narrowed(rate, scaler=scaler).model_dump(),
        "members": list(members),
    }
    return _described("bases", config)


def with_members(spec: pb.ArchitectureSpec, ids: Iterable[int]) -> pb.ArchitectureSpec:
    """Return the ensemble of some of an ensemble's base networks, in the given order.

    Raises
    ------
    ConfigError
        The network is not an ensemble.
    ValueError
        A base network is not in it or repeated, or there are none.
    """
    own = _arguments(spec)
    if not isinstance(own, BasesArguments):
        raise ConfigError(f"model: a network of the family {spec.family!r} has no base networks")
    chosen = list(ids)
    if missing := [number for number in chosen if number not in own.members]:
        raise ValueError(f"base network {missing[0]} is not among {own.members}")
    return _rebuilt(spec, own.model_dump() | {"members": chosen}, slices=True)


def with_norm(spec: pb.ArchitectureSpec, norm: Literal["batch", "static"]) -> pb.ArchitectureSpec:
    """Return the same network with another kind of normalisation.

    From "batch" to "static" it loses only its running statistics; HeteroFL and Split-Mix train
    so. A network without normalisation stays as it is: it has none to change.

    Raises
    ------
    ConfigError
        The network is a U-Net.
    """
    own = _arguments(spec)
    config = arguments(spec)
    if isinstance(own, BasesArguments):
        if own.base.get("norm", "none") == "none":
            return spec
        config["base"] = own.base | {"norm": norm}
    elif getattr(own, "norm", "none") == "none":
        return spec
    else:
        config["norm"] = norm
    return _rebuilt(spec, config, slices=False)


def _check_rate(rate: float) -> None:
    if not 0 < rate <= 1:
        raise ConfigError(f"levels: {rate} is not a share of a width; give a number above 0 and at most 1")


def _arguments(spec: pb.ArchitectureSpec) -> Any:
    """Return a classifier's validated arguments with defaults."""
    with torch.device("meta"):
        if spec.family == "unet" or spec.family not in FAMILIES:
            raise ConfigError(f"model: no sub-models of the family {spec.family!r}; choose a classifier")
        return cast(Classifier, FAMILIES[spec.family].construct(arguments(spec))).arguments


def _rebuilt(spec: pb.ArchitectureSpec, config: dict[str, Any], *, slices: bool) -> pb.ArchitectureSpec:
    """Describe the network of other arguments, with the dtypes of the original one."""
    whole = {tensor.name: tensor for tensor in spec.tensors}
    variant = _described(spec.family, config)
    for tensor in variant.tensors:
        source = whole.get(tensor.name)
        if source is not None:
            tensor.dtype = source.dtype
        if slices and (source is None or _exceeds(tensor.shape, source.shape)):
            held = "none" if source is None else str(list(source.shape))
            raise ValueError(
                f"tensor {tensor.name!r} of the sub-model has shape {list(tensor.shape)}, the network {held}"
            )
    return variant


def _exceeds(shape: Iterable[int], whole: Iterable[int]) -> bool:
    a, b = tuple(shape), tuple(whole)
    return len(a) != len(b) or any(x > y for x, y in zip(a, b, strict=True))


def _described(family: str, config: dict[str, Any]) -> pb.ArchitectureSpec:
    with torch.device("meta"):
        return describe(FAMILIES[family].construct(config))
