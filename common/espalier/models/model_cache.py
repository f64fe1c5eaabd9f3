"""Networks whose layers are kept from one training to the next: building a U-Net takes 20 times as long as filling it.

Only the layers are kept, on ``meta``: every tensor is new each time, so no number, gradient or view outlives the
training that it belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from espalier.models.architecture import build, build_with, check_tensors, digest_of
from espalier_proto import espalier_pb2 as pb

#: Families whose layers keep nothing in `forward`, and take long to build.
FAMILIES = frozenset({"unet"})
#: Networks kept, one a description: that of the run, and the widths or the pruned one beside it.
MOST = 4

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class _Place:
    """Where a tensor belongs, and what stands there while nobody trains."""

    module: nn.Module
    leaf: str
    empty: Tensor


@dataclass(frozen=True)
class _Shell:
    """A network without numbers."""

    digest: bytes
    model: nn.Module
    modules: tuple[nn.Module, ...]
    places: dict[str, _Place]
    tensors: int


#: Taken out while in use, so that two trainings never share one; single steps of a dict need no lock.
_idle: dict[bytes, _Shell] = {}
_lent: WeakKeyDictionary[nn.Module, _Shell] = WeakKeyDictionary()


def lend(spec: pb.ArchitectureSpec, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return the network of a description with copies of tensors, as `build_with` does.

    Parameters
    ----------
    spec : ArchitectureSpec
        As received.
    tensors : mapping of str to Tensor
        Every tensor of the description, by name.

    Returns
    -------
    nn.Module
        The caller's alone, in training mode. Whoever is done with it may :func:`give_back`.

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
    _lent[shell.model] = shell
    return shell.model.train()


def give_back(model: nn.Module) -> None:
    """Keep the layers of a network that :func:`lend` gave and nobody uses any more; its tensors are let go.

    A network that was changed (layers replaced, hooks left behind) is not kept, nor is one that was not lent.
    """
    shell = _lent.pop(model, None)
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
