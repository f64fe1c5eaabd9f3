"""FAug: federated augmentation before the first round of any method (Jeong et al. 2018, arXiv 1811.11479, §3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from espalier.config.fields import Count, PositiveInt, SettingsGroup
from espalier.config.run_settings import RunSettings
from espalier.wire.payload import Layout, TensorSpec
from espalier.wire.sections import SectionId

#: Section of a client's seeds, and its tensors.
SEEDS = SectionId("seeds")
SEED_IMAGES, SEED_LABELS = "images", "labels"
#: Section of the generator's tensors.
GENERATOR = SectionId("generator")


class AugmentSettings(SettingsGroup):
    """Whether clients' data is augmented."""

    augment: Literal["none", "faug"] = Field(
        default="none",
        description="faug: clients add images of a shared generator to labels they have few of",
    )


class FAugSettings(SettingsGroup):
    """What clients upload, and the training of the generator."""

    faug_scarce: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="a label with fewer images than this share of the client's mean is a target",
    )
    faug_seeds: PositiveInt = Field(
        default=5, description="largest number of images that a client uploads per label"
    )
    faug_redundant: Count = Field(
        default=0, description="labels uploaded in addition to the targets, to hide them"
    )
    faug_steps: PositiveInt = Field(default=1000, description="training steps of the conditional GAN")


def targets(counts: np.ndarray, scarce: float) -> np.ndarray:
    """Return the number of missing images of each label at a client.

    A label is a target if its count is below `scarce` times the client's mean count. A target is filled up to the mean
    count of the other labels, so that the client's data become IID.

    Parameters
    ----------
    counts : numpy.ndarray
        Label counts, shape (classes,).
    scarce : float
        `faug-scarce`.

    Returns
    -------
    numpy.ndarray
        int64 (classes,), 0 for a label that is not a target.
    """
    scarce_labels = counts < scarce * counts.mean()
    if scarce_labels.all() or not scarce_labels.any():
        return np.zeros(len(counts), np.int64)
    level = round(float(counts[~scarce_labels].mean()))
    missing: np.ndarray = np.where(scarce_labels, np.maximum(level - counts, 0), 0).astype(np.int64)
    return missing


def seed_labels(
    counts: np.ndarray, settings: RunSettings, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Return the labels of a client's seed images: the targets of which it has images, and redundant ones."""
    is_target = targets(counts, settings.of(FAugSettings).faug_scarce) > 0
    wanted = [int(label) for label in np.flatnonzero(is_target & (counts > 0))]
    others = np.flatnonzero(~is_target & (counts > 0))
    count = min(settings.of(FAugSettings).faug_redundant, len(others))
    redundant = sorted(int(label) for label in rng.choice(others, count, replace=False)) if count else []
    return wanted, redundant


def seeds_layout(metrics: Mapping[str, float], image_shape: Sequence[int]) -> Layout:
    """Return the layout of a client's seeds; raises ValueError for an absurd number of them."""
    count = metrics.get("seeds", -1)
    if not 0 <= count <= 10_000 or count != int(count):
        raise ValueError(f"{count:g} seed images")
    shape = (int(count), *image_shape)
    return Layout((TensorSpec(SEED_IMAGES, "uint8", shape), TensorSpec(SEED_LABELS, "int64", (int(count),))))


def leakage(wanted: int, redundant: int, uploaded: int) -> tuple[float, float]:
    """Return both privacy leakages of a client (§3).

    Device to server: |L_t| / (|L_t| + |L_r|), the server's confidence that an uploaded label is scarce there.
    Between devices: |L_t| / |∪_j (L_t,j ∪ L_r,j)|, what the generator discloses to the others.

    Parameters
    ----------
    wanted, redundant : int
        Target and redundant labels of the client.
    uploaded : int
        Labels uploaded by any client.
    """
    own = wanted + redundant
    return (wanted / own if own else 0.0), (wanted / uploaded if uploaded else 0.0)
