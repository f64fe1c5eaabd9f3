"""Conversion between a model's tensors and numpy arrays, for wire and state code without torch.

bfloat16 has no numpy type; such tensors are held as their 16 bits in uint16, as `espalier.wire` stores them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn


def to_array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as an array; a tensor on the CPU shares its memory.

    Parameters
    ----------
    tensor : Tensor
        Of any shape, on any device.

    Returns
    -------
    numpy.ndarray
        Of the same shape; uint16 bits for bfloat16.
    """
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    array: np.ndarray = tensor.numpy()
    return array


def to_tensor(array: np.ndarray, dtype: str = "") -> Tensor:
    """Return a writable copy of an array as a tensor.

    Parameters
    ----------
    array : numpy.ndarray
        May be a read-only view of received bytes.
    dtype : str
        The layout's dtype name if it differs from the array's dtype ("bfloat16" in uint16).
    """
    tensor = torch.from_numpy(np.array(array, copy=True))
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a torch dtype in layouts, e.g. ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def model_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """Return parameters and buffers in ``state_dict`` order; arrays of a model on the CPU are views of it."""
    return {name: to_array(tensor) for name, tensor in model.state_dict().items()}


def load_arrays(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy arrays into a model's own tensors.

    Raises
    ------
    ValueError
        A tensor is missing, superfluous or of another shape; the message names it.
    """
    own = model.state_dict()
    if missing := [name for name in own if name not in arrays]:
        raise ValueError(f"tensor {missing[0]!r} is missing ({len(missing)} in all)")
    if extra := [name for name in arrays if name not in own]:
        raise ValueError(f"tensor {extra[0]!r} is not part of the model ({len(extra)} in all)")
    with torch.no_grad():
        for name, tensor in own.items():
            if tuple(arrays[name].shape) != tuple(tensor.shape):
                raise ValueError(
                    f"tensor {name!r} has shape {list(arrays[name].shape)}, expected {list(tensor.shape)}"
                )
            tensor.copy_(to_tensor(arrays[name], dtype_name(tensor.dtype)))
