"""Tensors that a client stores by name while the sub-network it trains may change its size between rounds.

A sub-network holds the leading block ``w[:d0, :d1, …]`` of each tensor. Client state (SCAFFOLD's c_k, FedDyn's g_k) is
stored in the largest shape used so far. A round reads and replaces the leading block of its own shape; values outside
that block do not change, so sums over clients (c = mean c_k, h = mean g_k) stay valid there.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING

import numpy as np

from espalier import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = lazy.load("torch")


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def leading_block(array: np.ndarray | None, like: Tensor) -> Tensor:
    """Return an array's leading block in the shape of a tensor, zero outside the array.

    Parameters
    ----------
    array : numpy.ndarray or None
        The stored array. None, and an array of another number of dimensions, count as zeros.
    like : Tensor
        Defines shape, dtype and device.

    Returns
    -------
    Tensor
        A new tensor.
    """
    block = torch.zeros_like(like, requires_grad=False)
    if array is not None and array.ndim == like.dim():
        corner = tuple(slice(0, min(have, want)) for have, want in zip(array.shape, like.shape, strict=True))
        block[corner] = torch.from_numpy(np.array(array[corner])).to(like)
    return block


def read_blocks(
    state: Mapping[str, np.ndarray], prefix: str, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return, for each parameter, the leading block of ``state[prefix + name]`` in its shape; zero if absent."""
    return {name: leading_block(state.get(prefix + name), p.detach()) for name, p in parameters.items()}


def write_blocks(state: MutableMapping[str, np.ndarray], prefix: str, blocks: Mapping[str, Tensor]) -> None:
    """Replace the leading block of each ``state[prefix + name]``; the old arrays are not modified."""
    for name, block in blocks.items():
        new, old = block.detach().cpu().numpy(), state.get(prefix + name)
        if old is not None and old.ndim == new.ndim and old.shape != new.shape:
            shape = tuple(max(pair) for pair in zip(old.shape, new.shape, strict=True))
            whole = np.zeros(shape, new.dtype)
            whole[tuple(slice(0, n) for n in old.shape)] = old
            whole[tuple(slice(0, n) for n in new.shape)] = new
            new = whole
        state[prefix + name] = new


def on_device(like: nn.Module, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the tensor of a name, moved to the device of a network."""
    return tensors[name].to(next(like.parameters()).device)
