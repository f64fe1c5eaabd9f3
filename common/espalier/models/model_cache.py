"""A cache of networks between trainings: building a U-Net takes 20 times as long as loading its tensors.

Only modules are cached, with parameters on ``meta``: every tensor is new each time, so no value, gradient or view
outlives its training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from espalier.models.architecture import build, build_with, check_tensors, digest_of
from espalier_proto import espalier_pb2 as pb

#: Families whose layers store nothing in `forward`, and are slow to build.
FAMILIES = frozenset({"unet"})
#: Number of cached networks, one per description: that of the run, and its reduced or pruned ones.
MOST = 4

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class _Place:
    """A tensor's module and attribute, and the ``meta`` tensor in its place while the network is not in use."""

    module: nn.Module
    leaf: str
    empty: Tensor


@dataclass(frozen=True)
class _Shell:
    """A network whose tensors are on ``meta``."""

    digest: bytes
    model: nn.Module
    modules: tuple[nn.Module, ...]
    places: dict[str, _Place]
    tensors: int


#: Networks not in use, so that two trainings never share one; single dict operations need no lock.
_idle: dict[bytes, _Shell] = {}
_acquired: WeakKeyDictionary[nn.Module, _Shell] = WeakKeyDictionary()


def acquire(spec: pb.ArchitectureSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a network with copies of the given tensors, from the cache if possible; see `build_with`.

    Parameters
    ----------
    spec : ArchitectureSpec
        Description of the network, as received.
    tensors : mapping of str to Tensor
        All tensors of the description, by name.

    Returns
    -------
    nn.Module
        In training mode, for the caller's exclusive use, who may :func:`release` it afterwards.

    Raises
    ------
    ValueError
        As `build_with`.
    """
    if spec.family not in FAMILIES:
        return build_with(spec, tensors)
    digest = digest_of(spec)
    shell = _idle.pop(digest, None) or _shell(digest, build(spec))
    check_tensors({name: place.empty for name, place in shell.places.items()}, tensors)
    for name, place in shell.places.items():
        given = tensors[name].detach().clone()
        if isinstance(place.empty, nn.Parameter):
            given = nn.Parameter(given, requires_grad=place.empty.requires_grad)
        setattr(place.module, place.leaf, given)
    _acquired[shell.model] = shell
    return shell.model.train()


def release(model: nn.Module) -> None:
    """Return a network of :func:`acquire` to the cache and drop its tensors.

    A network whose modules or hooks were changed is not cached, nor is one that was not acquired.
    """
    shell = _acquired.pop(model, None)
    if shell is None or not _unchanged(shell):
        return
    for place in shell.places.values():
        setattr(place.module, place.leaf, place.empty)
    _idle[shell.digest] = shell
    while len(_idle) > MOST:
        _idle.pop(next(iter(_idle)), None)


def _shell(digest: bytes, model: nn.Module) -> _Shell:
    places = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        path, _, leaf = name.rpartition(".")
        places[name] = _Place(model.get_submodule(path), leaf, tensor)
    modules = tuple(model.modules())
    # Counted as `_unchanged` does, biases that a layer does not have included.
    tensors = sum(len(vars(m)["_parameters"]) + len(vars(m)["_buffers"]) for m in modules)
    return _Shell(digest, model, modules, places, tensors)


def _unchanged(shell: _Shell) -> bool:
    modules = tuple(shell.model.modules())
    if len(modules) != len(shell.modules):
        return False
    tensors = 0
    for module, built in zip(modules, shell.modules, strict=True):
        held = vars(module)
        if module is not built or any(held[hooks] for hooks in _HOOKS):
            return False
        tensors += len(held["_parameters"]) + len(held["_buffers"])
    return tensors == shell.tensors
