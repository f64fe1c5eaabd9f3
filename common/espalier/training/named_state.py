"""Tensors a client keeps by name while the sub-network it trains may change its size from round to round.

A sub-network holds the leading block ``w[:d0, :d1, …]`` of each tensor. What a client keeps (SCAFFOLD's c_k,
FedDyn's g_k) is kept in the largest shape it ever held; a round reads and replaces the leading block of its
own shape, and what lies outside stays, so sums over clients (c = mean c_k, h = mean g_k) go on to hold there.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import numpy as np
import torch
from torch import Tensor, nn


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name: buffers and frozen ones are not among them."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def leading_block(array: np.ndarray | None, like: Tensor) -> Tensor:
    """Return an array's leading block in the shape of a tensor, zero where the array does not reach.

    Parameters
    ----------
    array : numpy.ndarray or None
        What is kept; None, or one of another number of dimensions, holds nothing.
    like : Tensor
        Gives shape, dtype and device.

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
    kept: Mapping[str, np.ndarray], prefix: str, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the leading block of every ``prefix + name`` in the shape of the parameter of that name."""
    return {name: leading_block(kept.get(prefix + name), p.detach()) for name, p in parameters.items()}


def write_blocks(state: MutableMapping[str, np.ndarray], prefix: str, blocks: Mapping[str, Tensor]) -> None:
    """Replace the leading block of every ``prefix + name`` in a state; kept arrays are not written to."""
    for name, block in blocks.items():
        new, old = block.detach().cpu().numpy(), state.get(prefix + name)
        if old is not None and old.ndim == new.ndim and old.shape != new.shape:
            shape = tuple(max(pair) for pair in zip(old.shape, new.shape, strict=True))
            whole = np.zeros(shape, new.dtype)
            whole[tuple(slice(0, n) for n in old.shape)] = old
            whole[tuple(slice(0, n) for n in new.shape)] = new
            new = whole
        state[prefix + name] = new


def on(like: nn.Module, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a tensor by name on the device of a network."""
    return tensors[name].to(next(like.parameters()).device)
