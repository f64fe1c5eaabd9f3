"""Adds a weighted array to a running sum in pieces that stay in the processor's cache."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: Elements of a piece. `total += factor * array` on whole arrays writes and reads a product as large as a model,
#: whose fresh pages cost more than the sum itself; a product of this size never leaves the cache.
PIECE = 1 << 18


def add_scaled(total: npt.NDArray[np.floating], factor: float, array: npt.NDArray[np.floating]) -> None:
    """Add ``factor * array`` to `total` in place, number for number as numpy's expression does.

    Parameters
    ----------
    total : array
        Floating point, any shape; may be a strided view.
    factor : float
        Rounded to the type of `total` first.
    array : array
        Of the shape of `total`, of its type or a narrower one.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if total.shape != array.shape:
        raise ValueError(f"an array of shape {list(array.shape)} for a sum of shape {list(total.shape)}")
    scale = total.dtype.type(factor)
    if total.size <= PIECE:
        total += scale * array
        return
    if total.flags.c_contiguous and array.flags.c_contiguous:
        total, array = total.reshape(-1), array.reshape(-1)
    # Pieces of whole rows; a row that is longer than a piece is taken apart in turn.
    rows = PIECE // (total.size // len(total))
    if rows == 0:
        for part, addend in zip(total, array, strict=True):
            add_scaled(part, factor, addend)
        return
    product = np.empty((rows, *total.shape[1:]), total.dtype)
    for start in range(0, len(total), rows):
        part = total[start : start + rows]
        scaled = product[: len(part)]
        np.multiply(array[start : start + rows], scale, out=scaled)
        np.add(part, scaled, out=part)
