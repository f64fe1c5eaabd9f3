"""Label histograms: what a client tells of its data, and the checks on one that was received."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from espalier.errors import DataError


def label_histogram(labels: ArrayLike, classes: int | Sequence[str]) -> NDArray[np.float64]:
    """Count the labels of each class.

    Parameters
    ----------
    labels : array-like of int
        Class of each sample, shape [N].
    classes : int or sequence of str
        Number of classes, or their names.

    Returns
    -------
    ndarray
        Counts, float64, shape [classes].

    Raises
    ------
    DataError
        A label lies outside the classes.
    """
    count = classes if isinstance(classes, int) else len(classes)
    values = np.asarray(labels, np.int64).reshape(-1)
    outside = values[(values < 0) | (values >= count)]
    if outside.size:
        raise DataError(f"label {outside[0]} lies outside 0 to {count - 1}")
    return np.bincount(values, minlength=count).astype(np.float64)


def add_laplace_noise(
    counts: NDArray[np.float64], epsilon: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Add Laplace noise to each count and cut at zero.

    Adding or removing one image changes one count by one, so the histogram's L1 sensitivity is 1 and noise of
    scale 1/epsilon makes it epsilon-differentially private (Dwork et al., TCC 2006, the Laplace mechanism). Where
    the number of images is known, replacing one image changes two counts, and the guarantee is 2 epsilon.
    Cutting at zero afterwards costs no privacy.

    Parameters
    ----------
    counts : ndarray
        Counts per class.
    epsilon : float
        Epsilon > 0 of the guarantee.
    rng : numpy.random.Generator
        Source of the noise.

    Returns
    -------
    ndarray
        A new histogram of the same length, every count >= 0.
    """
    if not (np.isfinite(epsilon) and epsilon > 0):
        raise DataError(f"the histogram's epsilon must be a finite number above 0, not {epsilon}")
    return np.maximum(np.asarray(counts, np.float64) + rng.laplace(0.0, 1 / epsilon, len(counts)), 0.0)
