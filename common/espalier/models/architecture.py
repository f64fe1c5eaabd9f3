"""Architecture descriptions: a sender describes a network by the shapes of its tensors, a receiver rebuilds it.

The receiver needs no pruning library: it builds the family's unpruned network on torch's ``meta`` device (no
memory, no random numbers), sets every layer's width from the tensors' shapes and loads the tensors strictly. A
description is untrusted and validated before a module is built: family, constructor arguments, sizes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct
from torch import Tensor, nn

from espalier.models import unet_family
from espalier.models.arrays import dtype_name
from espalier.models.backbone import Backbone
from espalier.models.bases import Bases
from espalier.models.classifiers import CNN, MLP
from espalier.models.exits import ExitNetwork
from espalier.models.family import Family, classifier_family
from espalier.models.resnet import PreActResNet
from espalier_proto import espalier_pb2 as pb

#: Largest number of elements of a network; a larger one is refused before memory is allocated.
MAX_PARAMETERS = 1_000_000_000
#: Largest number of tensors of a network.
MAX_TENSORS = 10_000

#: Digests of the newest descriptions whose layers were verified, and their largest number. A client receives the same
#: description every round, and verifying takes longer than building the network.
_verified: dict[bytes, None] = {}
_VERIFIED_CACHED = 64

_DTYPES = {
    dtype_name(d): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)
}


FAMILIES: Mapping[str, Family] = {
    "unet": Family(
        matches=unet_family.matches,
        config=unet_family.config,
        construct=unet_family.construct,
        set_sizes=unet_family.set_sizes,
        verify=unet_family.verify_unet,
        heads=unet_family.heads,
        inputs=unet_family.inputs,
    ),
    "mlp": classifier_family("mlp", MLP),
    "cnn": classifier_family("cnn", CNN),
    "resnet": classifier_family("resnet", PreActResNet),
    "exits": classifier_family("exits", ExitNetwork),
    "bases": classifier_family("bases", Bases),
    "backbone": classifier_family("backbone", Backbone),
}


def describe(model: nn.Module) -> pb.ArchitectureSpec:
    """Describe a network, pruned or not, for a receiver's :func:`build`.

    Parameters
    ----------
    model : nn.Module
        A network of a registered family.

    Returns
    -------
    ArchitectureSpec
        Tensors in ``state_dict`` order.

    Raises
    ------
    TypeError
        The network is of no registered family.
    """
    name = _family_of(model)
    family = FAMILIES[name]
    config = Struct()
    config.update(family.config(model))
    buffers = {key for key, _ in model.named_buffers()}
    return pb.ArchitectureSpec(
        family=name,
        config=config,
        tensors=[
            pb.TensorSpec(
                name=key, dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), buffer=key in buffers
            )
            for key, tensor in model.state_dict().items()
        ],
        groups={path: m.num_groups for path, m in model.named_modules() if isinstance(m, nn.GroupNorm)},
        heads=family.heads(model),
    )


def _family_of(model: nn.Module) -> str:
    name = next((name for name, family in FAMILIES.items() if family.matches(model)), None)
    if name is None:
        known = ", ".join(FAMILIES)
        raise TypeError(f"no family describes a {type(model).__name__}; known families are {known}")
    return name


def build(spec: pb.ArchitectureSpec) -> nn.Module:
    """Build the network of a description, its tensors on ``meta``.

    Parameters
    ----------
    spec : ArchitectureSpec
        As received; it is validated.

    Returns
    -------
    nn.Module
        In training mode; give it tensors with :func:`build_with`.

    Raises
    ------
    ValueError
        The description is invalid; the message names the part, the caller knows the sender.
    """
    family = FAMILIES.get(spec.family)
    if family is None:
        raise ValueError(
            f"the architecture family {spec.family!r} is unknown; known are {', '.join(FAMILIES)}"
        )
    shapes = _checked_shapes(spec)
    with torch.device("meta"):
        model = family.construct(arguments(spec))
        _set_shapes(model, spec, shapes)
        _set_widths(model, spec.groups)
        family.set_sizes(model, spec.heads)
        digest = digest_of(spec)
        if digest not in _verified:
            family.verify(model)
            while len(_verified) >= _VERIFIED_CACHED:
                _verified.pop(next(iter(_verified)), None)
            _verified[digest] = None
    return model.train()


def build_with(spec: pb.ArchitectureSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Build the network of a description and load its tensors strictly.

    Parameters
    ----------
    spec : ArchitectureSpec
        As received.
    tensors : mapping of str to Tensor
        All tensors of the description, by name. They are copied, so training does not modify the received
        buffers.

    Returns
    -------
    nn.Module
        On the device of the tensors, in training mode.

    Raises
    ------
    ValueError
        The description is invalid, or a tensor is missing, superfluous or of another shape or dtype.
    """
    model = build(spec)
    expected = model.state_dict()
    check_tensors(expected, tensors)
    model.load_state_dict(
        {name: tensors[name].detach().clone() for name in expected}, strict=True, assign=True
    )
    return model


def check_tensors(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if tensors differ from those that a network expects, in name, shape or dtype."""
    if missing := [name for name in expected if name not in tensors]:
        raise ValueError(f"tensor {missing[0]!r} is missing ({len(missing)} in all)")
    if extra := [name for name in tensors if name not in expected]:
        raise ValueError(f"tensor {extra[0]!r} is not part of the architecture ({len(extra)} in all)")
    for name, like in expected.items():
        given = tensors[name]
        if given.shape != like.shape or given.dtype != like.dtype:
            raise ValueError(
                f"tensor {name!r} is {dtype_name(given.dtype)}{list(given.shape)}, "
                f"the architecture says {dtype_name(like.dtype)}{list(like.shape)}"
            )


def digest_of(spec: pb.ArchitectureSpec) -> bytes:
    """Return the SHA-256 digest that identifies a description."""
    return hashlib.sha256(spec.SerializeToString(deterministic=True)).digest()


def is_reduced(model: nn.Module) -> bool:
    """Whether a tensor differs in shape from the network of the configuration, as after pruning or scaling."""
    family = _family_of(model)
    whole = _whole_shapes(family, json.dumps(FAMILIES[family].config(model), sort_keys=True))
    return any(whole.get(name) != tuple(tensor.shape) for name, tensor in model.state_dict().items())


@lru_cache(maxsize=64)
def _whole_shapes(family: str, config: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an unpruned network, cached: a client needs them every round, and building takes 20 ms."""
    struct = Struct()
    struct.update(json.loads(config))
    with torch.device("meta"):
        model = FAMILIES[family].construct(_plain(MessageToDict(struct)))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def to_json(spec: pb.ArchitectureSpec) -> str:
    """Return the protobuf JSON form of a description, indented."""
    return json.dumps(MessageToDict(spec, preserving_proto_field_name=True), indent=1)


def arguments(spec: pb.ArchitectureSpec) -> dict[str, Any]:
    """Return a description's constructor arguments, unchecked; whole numbers are int."""
    values: dict[str, Any] = _plain(MessageToDict(spec.config))
    return values


def _plain(value: Any) -> Any:
    """Convert a Struct's doubles to int where they are whole numbers."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _checked_shapes(spec: pb.ArchitectureSpec) -> dict[str, tuple[int, ...]]:
    if not 0 < len(spec.tensors) <= MAX_TENSORS:
        raise ValueError(f"an architecture of {len(spec.tensors)} tensors; 1 to {MAX_TENSORS} are allowed")
    shapes: dict[str, tuple[int, ...]] = {}
    total = 0
    for tensor in spec.tensors:
        shape = tuple(tensor.shape)
        if tensor.name in shapes:
            raise ValueError(f"tensor {tensor.name!r} is described twice")
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"tensor {tensor.name!r} has the dtype {tensor.dtype!r}; known are {', '.join(_DTYPES)}"
            )
        if len(shape) > 8 or 0 in shape:
            raise ValueError(f"tensor {tensor.name!r} has the shape {list(shape)}")
        shapes[tensor.name] = shape
        total += math.prod(shape)
        if total > MAX_PARAMETERS:
            raise ValueError(
                f"an architecture of more than {MAX_PARAMETERS:,} parameters (at tensor {tensor.name!r})"
            )
    return shapes


def _set_shapes(model: nn.Module, spec: pb.ArchitectureSpec, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Replace every parameter and buffer on meta by one of the described shape and dtype."""
    expected = list(model.state_dict())
    if missing := [name for name in expected if name not in shapes]:
        raise ValueError(f"tensor {missing[0]!r} is not described ({len(missing)} in all)")
    if extra := set(shapes).difference(expected):
        raise ValueError(f"tensor {min(extra)!r} is not part of this {spec.family} ({len(extra)} in all)")
    for tensor in spec.tensors:
        path, _, leaf = tensor.name.rpartition(".")
        module = model.get_submodule(path)
        old = getattr(module, leaf)
        if old.dim() != len(tensor.shape):
            raise ValueError(
                f"tensor {tensor.name!r} has shape {list(tensor.shape)}, expected {old.dim()} dimensions"
            )
        trained = isinstance(old, nn.Parameter)
        if tensor.buffer == trained:
            raise ValueError(f"tensor {tensor.name!r} is {'a parameter' if trained else 'a buffer'}")
        if _DTYPES[tensor.dtype].is_floating_point != old.dtype.is_floating_point:
            raise ValueError(
                f"tensor {tensor.name!r} has the dtype {tensor.dtype!r}, expected {dtype_name(old.dtype)!r}"
            )
        new = torch.empty(tuple(tensor.shape), dtype=_DTYPES[tensor.dtype], device="meta")
        if isinstance(old, nn.Parameter):
            setattr(module, leaf, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            module.register_buffer(leaf, new)


def _set_widths(model: nn.Module, groups: Mapping[str, int]) -> None:
    """Set the layers' widths from their weights, and check that the tensors of a layer are consistent."""
    norms = {path for path, module in model.named_modules() if isinstance(module, nn.GroupNorm)}
    if set(groups) != norms:
        path = min(set(groups) ^ norms)
        raise ValueError(
            f"GroupNorm {path!r} " + ("has no groups" if path in norms else "is not part of the network")
        )
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            _check_length(path, "bias", module.bias, module.weight)
            if tuple(module.weight.shape[2:]) != tuple(module.kernel_size):
                raise ValueError(
                    f"tensor {path + '.weight'!r} has a kernel of {list(module.weight.shape[2:])}, "
                    f"expected {list(module.kernel_size)}"
                )
            if module.groups > 1:
                # Only depthwise convolutions have groups here, one per channel.
                module.groups = module.weight.shape[0]
            module.out_channels, module.in_channels = (
                module.weight.shape[0],
                module.weight.shape[1] * module.groups,
            )
        elif isinstance(module, nn.Linear):
            _check_length(path, "bias", module.bias, module.weight)
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.BatchNorm2d):
            for leaf in ("bias", "running_mean", "running_var"):
                _check_length(path, leaf, getattr(module, leaf), module.weight)
            module.num_features = module.weight.shape[0]
        elif isinstance(module, nn.GroupNorm):
            _check_length(path, "bias", module.bias, module.weight)
            module.num_channels, module.num_groups = module.weight.shape[0], groups[path]
            if module.num_groups < 1 or module.num_channels % module.num_groups:
                raise ValueError(
                    f"GroupNorm {path!r} has {module.num_channels} channels, "
                    f"not a multiple of {module.num_groups} groups"
                )


def _check_length(path: str, leaf: str, given: Tensor | None, weight: Tensor) -> None:
    if given is not None and given.shape[0] != weight.shape[0]:
        raise ValueError(
            f"tensor {f'{path}.{leaf}'!r} has {given.shape[0]} elements, "
            f"its weight has {weight.shape[0]} outputs"
        )
