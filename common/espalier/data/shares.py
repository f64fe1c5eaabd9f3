"""Options of a client's share beyond its partition: size, test images, rotation, few-shot subsets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from espalier.errors import DataError
from espalier.seeds import rng_for

if TYPE_CHECKING:
    import torch

    from espalier.data.imageset import ImageSet

OPTIONS = "+rotate=2 or +rotate=4, +lognormal=SIGMA, +holdout=SHARE, +shots=IMAGES, +scarce=LABELS"
#: Number of images of a scarce label that a client has (FAug's experiments, Jeong et al. 2018).
SCARCE_IMAGES = 5

_NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+")


@dataclass(frozen=True)
class Extras:
    """The options after a scheme.

    Attributes
    ----------
    rotate : int
        R: the images of client i are rotated by 360/R * (i mod R) degrees; 1: no rotation.
    lognormal : float
        Sigma of the log-normal distribution of the clients' sizes; 0: the sizes of the partition.
    holdout : float
        Share of each client's images that become its test images, for folders without a test split.
    shots : int
        Largest number of training images of each class that a client has; 0: all.
    scarce : int
        Number of labels of which a client has only `SCARCE_IMAGES` training images, drawn per client.
    """

    rotate: int = 1
    lognormal: float = 0.0
    holdout: float = 0.0
    shots: int = 0
    scarce: int = 0

    @classmethod
    def parse(cls, texts: list[str], whole: str) -> Extras:
        """Read options such as ``rotate=4``; `whole` is the SPEC, for the message of a DataError."""
        given: dict[str, float] = {}
        for text in texts:
            key, _, number = text.partition("=")
            if key not in ("rotate", "lognormal", "holdout", "shots", "scarce") or not _NUMBER.fullmatch(
                number
            ):
                raise DataError(f"data {whole!r}: option '+{text}' is not understood; give {OPTIONS}")
            if key in given:
                raise DataError(f"data {whole!r}: +{key} is given twice; leave one of them out")
            given[key] = float(number)
        if given.get("rotate", 2) not in (2, 4):
            raise DataError(f"data {whole!r}: +rotate takes steps of 180 or 90 degrees; give 2 or 4")
        if not 0 < given.get("lognormal", 1) <= 5:
            raise DataError(f"data {whole!r}: +lognormal needs a sigma above 0 and at most 5, e.g. 1.0")
        if not 0 < given.get("holdout", 0.5) < 1:
            raise DataError(f"data {whole!r}: +holdout needs a share between 0 and 1, e.g. 0.2")
        for key, what in (("shots", "images of each class"), ("scarce", "labels")):
            if given.get(key, 1) < 1 or given.get(key, 1) % 1:
                raise DataError(f"data {whole!r}: +{key} needs a whole number of {what}, e.g. +{key}=3")
        return cls(
            int(given.get("rotate", 1)),
            given.get("lognormal", 0.0),
            given.get("holdout", 0.0),
            int(given.get("shots", 0)),
            int(given.get("scarce", 0)),
        )

    def thin(self, labels: NDArray[np.int64], classes: int, *, seed: int, name: str) -> NDArray[np.int64]:
        """Return the indices of the training images that `shots` and `scarce` leave to a client.

        Parameters
        ----------
        labels : ndarray
            Classes of the client's images, shape [N].
        classes : int
            Number of classes.
        seed : int
            Seed of the draw.
        name : str
            Data set and client, part of the seed.

        Returns
        -------
        ndarray
            Ascending indices, int64.

        Raises
        ------
        DataError
            There are fewer classes than scarce labels.
        """
        if self.scarce > classes:
            raise DataError(f"data {name!r}: +scarce={self.scarce}, there are {classes} classes; give fewer")
        most = np.full(classes, self.shots or len(labels))
        chosen = rng_for(seed, name, 0, "scarce labels").permutation(classes)[: self.scarce]
        most[chosen] = np.minimum(most[chosen], SCARCE_IMAGES)
        rng = rng_for(seed, name, 0, "thinned images")
        subsets = [
            rng.permutation(np.flatnonzero(labels == label))[: most[label]] for label in range(classes)
        ]
        return np.sort(np.concatenate(subsets))


def resize(
    owner: NDArray[np.int64],
    labels: NDArray[np.int64],
    clients: int,
    sigma: float,
    *,
    seed: int,
    name: str,
    min_size: int = 1,
) -> NDArray[np.int64]:
    """Give the clients of a partition unequal sizes.

    Client i draws a log-normal factor s_i. With k_ic samples of class c at client i in the given partition and n_c in
    all, the client gets n_ic = n_c * s_i k_ic / sum_j s_j k_jc. So sizes are log-normal if every client has every
    class, no client gets a class that it did not have, and every sample has an owner.

    Parameters
    ----------
    owner, labels : ndarray
        A partition and the classes, int64, shape [N]; owner -1 is unchanged.
    clients : int
        Number of clients.
    sigma : float
        Standard deviation of the sizes' logarithm.
    seed : int
        Seed of sizes and samples.
    name : str
        Name of the data set, part of the seed.
    min_size : int
        Fewest samples of a client.

    Returns
    -------
    ndarray
        The new owners, shape [N].

    Raises
    ------
    DataError
        A client would get fewer than `min_size` samples.
    """
    rng = rng_for(seed, name, 0, f"sizes/{clients}/{sigma!r}")
    table = label_table(owner, labels, clients).astype(np.float64)
    totals = table.sum(axis=0)
    table *= rng.lognormal(0.0, sigma, clients)[:, None]
    counts = apportion(table * _ratio(totals, table.sum(axis=0)), totals.astype(np.int64), rng)
    smallest = int(counts.sum(axis=1).min())
    if smallest < min_size:
        raise DataError(
            f"data {name!r} in {clients} partitions with +lognormal={sigma:g}: a client would get {smallest} of "
            f"{len(labels)} samples; use fewer partitions or a smaller sigma"
        )
    return deal(counts, np.where(owner >= 0, labels, -1), rng)


def divide_test(
    owner: NDArray[np.int64],
    labels: NDArray[np.int64],
    test_labels: NDArray[np.int64],
    clients: int,
    *,
    seed: int,
    name: str,
) -> NDArray[np.int64]:
    """Divide a test split so that each client's test images have the label proportions of its training images.

    Each class of the test split is divided in the proportions of the training split. So the parts are disjoint, cover
    all classes that a client trains on, and have the relative sizes of the training parts, up to rounding.

    Parameters
    ----------
    owner, labels : ndarray
        Partition and classes of the training split, int64, shape [N].
    test_labels : ndarray
        Classes of the test split, int64, shape [M].
    clients : int
        Number of clients.
    seed : int
        Seed of the draw.
    name : str
        Name of the data set, part of the seed.

    Returns
    -------
    ndarray
        Owner of each test sample, int64, shape [M]; -1 if no client trains on the class. A client may get
        none if there are fewer test images than clients.
    """
    classes = int(max(labels.max(initial=-1), test_labels.max(initial=-1))) + 1
    table = label_table(owner, labels, clients, classes).astype(np.float64)
    held = table.sum(axis=0)
    totals = np.bincount(test_labels, minlength=classes) * (held > 0)
    rng = rng_for(seed, name, 0, f"test-share/{clients}")
    counts = apportion(table * _ratio(totals.astype(np.float64), held), totals, rng)
    return deal(counts, test_labels, rng)


def label_table(
    owner: NDArray[np.int64], labels: NDArray[np.int64], clients: int, classes: int = 0
) -> NDArray[np.int64]:
    """Count each client's samples of each class: int64, shape [clients, classes]."""
    table = np.zeros((clients, max(classes, int(labels.max(initial=-1)) + 1)), np.int64)
    owned = owner >= 0
    np.add.at(table, (owner[owned], labels[owned]), 1)
    return table


def apportion(
    quotas: NDArray[np.float64], totals: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Round a table of quotas to whole numbers whose columns sum to `totals`.

    Every entry is its quota rounded down or up. Entries of the rows that are furthest below their quotas are rounded
    up, so that row sums are near the sums of the quotas, too. Then an empty row takes one from the row with the largest
    entry in the column of its highest quota, if that row has more than one in all.

    Parameters
    ----------
    quotas : ndarray
        float64, shape [rows, columns], columns summing to `totals`.
    totals : ndarray
        int64, shape [columns].
    rng : numpy.random.Generator
        Breaks ties.

    Returns
    -------
    ndarray
        int64, shape [rows, columns].
    """
    quotas = np.round(quotas, 9)  # 2.9999999999 is 3
    counts = np.floor(quotas).astype(np.int64)
    lag = np.zeros(len(quotas))
    for column, total in enumerate(totals):
        rest = quotas[:, column] - counts[:, column]
        lag += rest
        open_rows = rng.permutation(np.flatnonzero(rest > 0))
        missing = int(total - counts[:, column].sum())
        chosen = open_rows[np.argsort(-lag[open_rows], kind="stable")][:missing]
        counts[chosen, column] += 1
        lag[chosen] -= 1.0
    for row in np.flatnonzero((counts.sum(axis=1) == 0) & (quotas.sum(axis=1) > 0)):
        column = int(quotas[row].argmax())
        spare = np.where(counts.sum(axis=1) > 1, counts[:, column], 0)
        if spare.max() > 0:
            counts[int(spare.argmax()), column] -= 1
            counts[row, column] += 1
    return counts


def deal(counts: NDArray[np.int64], labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Assign the samples of each class at random, by a table of counts [clients, classes]; label -1 is not assigned."""
    owner = np.full(len(labels), -1, np.int64)
    for label in range(counts.shape[1]):
        samples = rng.permutation(np.flatnonzero(labels == label))
        owners = np.repeat(np.arange(len(counts)), counts[:, label])
        owner[samples[: len(owners)]] = owners
    return owner


def hold_out(
    labels: NDArray[np.int64], share: float, *, seed: int, name: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split samples into a training part and a test share, stratified by class.

    Returns
    -------
    tuple of ndarray
        Indices of the training and of the test samples, both sorted. Fixed by labels, share, seed and name.

    Raises
    ------
    DataError
        One of the two would be empty.
    """
    rng = rng_for(seed, name, 0, "holdout")
    # In class order, a sample is for testing where the cumulative share passes a whole number: stratified by class.
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    reached = np.floor(np.round(np.arange(len(labels) + 1) * share, 9))
    test = np.zeros(len(labels), bool)
    test[by_class] = np.diff(reached) > 0
    if not 0 < test.sum() < len(labels):
        raise DataError(
            f"data {name!r}: +holdout={share:g} of {len(labels)} images leaves none to "
            f"{'train on' if test.any() else 'test on'}; give another share or more images"
        )
    return np.flatnonzero(~test), np.flatnonzero(test)


class RotatedImages:
    """The images of another set, rotated counter-clockwise by multiples of 90 degrees (``numpy.rot90``).

    Parameters
    ----------
    data : ImageSet
        The images.
    quarters : int
        Number of rotations by 90 degrees.

    Raises
    ------
    DataError
        The images are not square.
    """

    def __init__(self, data: ImageSet, quarters: int) -> None:
        if data.shape[1] != data.shape[2]:
            raise DataError(
                f"data {data.name!r}: images of {data.shape[1]} x {data.shape[2]} cannot be rotated; use square ones"
            )
        self._data, self.quarters = data, quarters % 4
        self.labels, self.classes, self.shape, self.name = data.labels, data.classes, data.shape, data.name

    def __len__(self) -> int:
        return len(self._data)

    def fetch(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Return float32 images [B, C, H, W] in [-1, 1], rotated."""
        return self._data.fetch(indices).rot90(self.quarters, (2, 3)).contiguous()

    def subset(self, indices: NDArray[np.int64]) -> RotatedImages:
        """Return the images at `indices`, rotated alike."""
        return RotatedImages(self._data.subset(indices), self.quarters)


def _ratio(wanted: NDArray[np.float64], have: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(wanted, have, out=np.zeros_like(wanted), where=have > 0)
