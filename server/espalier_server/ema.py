"""Exponential moving average of the global model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def ema_update(
    average: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray], decay: float
) -> dict[str, np.ndarray]:
    """Update the exponential moving average (EMA) of a model's arrays.

    Parameters
    ----------
    average : mapping of str to numpy.ndarray
        The average so far; not modified. If it is empty or has other shapes (the model was pruned since), the
        average restarts at `new`.
    new : mapping of str to numpy.ndarray
        The model's arrays.
    decay : float
        In [0, 1): ``average <- decay * average + (1 - decay) * new``.

    Returns
    -------
    dict of str to numpy.ndarray
        The new average, with the dtypes of `new`; arrays that are not floating point are copied from `new`.
    """
    shapes = {name: array.shape for name, array in new.items()}
    if {name: array.shape for name, array in average.items()} != shapes:
        return {name: array.copy() for name, array in new.items()}
    moved = {}
    for name, array in new.items():
        if array.dtype.kind == "f":
            moved[name] = (decay * average[name] + (1 - decay) * array).astype(array.dtype)
        else:
            moved[name] = array.copy()
    return moved
