"""FAug: federated augmentation in front of any method (Jeong et al. 2018, arXiv 1811.11479, §3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from espalier.config.run_config import RunConfig
from espalier.wire.payload import Layout, TensorSpec

#: Tensors of a client's seeds.
SEED_IMAGES, SEED_LABELS = "seeds/images", "seeds/labels"


def targets(counts: np.ndarray, scarce: float) -> np.ndarray:
    """Return how many images of each label a client lacks.

    A label is a target if the client has fewer than `scarce` times its mean count; a target lacks what it has
    less than the mean of the labels that are none, so that filling makes the client's data IID.

    Parameters
    ----------
    counts : numpy.ndarray
        Label counts, shape (classes,).
    scarce : float
        `faug-scarce`.

    Returns
    -------
    numpy.ndarray
        int64 (classes,), 0 for a label that is no target.
    """
    lacking = counts < scarce * counts.mean()
    if lacking.all() or not lacking.any():
        return np.zeros(len(counts), np.int64)
    level = round(float(counts[~lacking].mean()))
    missing: np.ndarray = np.where(lacking, np.maximum(level - counts, 0), 0).astype(np.int64)
    return missing


def seed_labels(
    counts: np.ndarray, settings: RunConfig, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Return the labels of a client's seeds: its targets as far as it has any image, and redundant ones."""
    lacking = targets(counts, settings.faug_scarce) > 0
    wanted = [int(label) for label in np.flatnonzero(lacking & (counts > 0))]
    others = np.flatnonzero(~lacking & (counts > 0))
    count = min(settings.faug_redundant, len(others))
    redundant = sorted(int(label) for label in rng.choice(others, count, replace=False)) if count else []
    return wanted, redundant


def seeds_layout(metrics: Mapping[str, float], image_shape: Sequence[int], settings: RunConfig) -> Layout:
    """Return the layout of a client's seeds; raises ValueError for an absurd number of them."""
    count = metrics.get("seeds", -1)
    if not 0 <= count <= 10_000 or count != int(count):
        raise ValueError(f"{count:g} seed images")
    shape = (int(count), *image_shape)
    return Layout((TensorSpec(SEED_IMAGES, "uint8", shape), TensorSpec(SEED_LABELS, "int64", (int(count),))))


def leakage(wanted: int, redundant: int, uploaded: int) -> tuple[float, float]:
    """Return both privacy leakages of a client (§3).

    Device to server: |L_t| / (|L_t| + |L_r|), how sure the server is that an uploaded label is scarce there.
    Between devices: |L_t| / |∪_j (L_t,j ∪ L_r,j)|, what the generator tells the others.

    Parameters
    ----------
    wanted, redundant : int
        Target and redundant labels of the client.
    uploaded : int
        Labels that anybody uploaded.
    """
    own = wanted + redundant
    return (wanted / own if own else 0.0), (wanted / uploaded if uploaded else 0.0)
