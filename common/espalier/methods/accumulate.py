"""Addition of a weighted array to a running sum, in blocks that fit the processor's cache."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: Elements of a block. `total += factor * array` on whole arrays allocates a product as large as a model, whose page
#: faults cost more than the sum; a product of this size stays in the cache.
PIECE = 1 << 18


def add_scaled(total: npt.NDArray[np.floating], factor: float, array: npt.NDArray[np.floating]) -> None:
    """Add ``factor * array`` to `total` in place, with the same rounding as NumPy's expression.

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
    # Blocks of whole rows; a row longer than a block is split recursively.
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
