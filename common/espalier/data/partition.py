"""Seeded partitions of a labelled data set: the client of each sample, the same in every process.

Each client computes the partition by itself from (data name, number of clients, scheme). IID, Dirichlet and
pathological partitions are those of flwr-datasets' partitioners to the sample (a test compares them); importing
that package takes seconds and 120 MB.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from espalier.errors import DataError
from espalier.seeds import rng_for, seed_for

log = logging.getLogger(__name__)

SCHEMES = "iid, dirichlet=ALPHA, pathological=CLASSES, fedphd or fedphd=CLASSES, similarity=PERCENT"
_OPTIONS = "seed=S and, for dirichlet, min=SAMPLES"
#: Draws of a Dirichlet partition before it is refused because a client has fewer than `min` samples.
_DIRICHLET_DRAWS = 11


@dataclass(frozen=True)
class Scheme:
    """A partition scheme: `kind` with its `value`, and a seed.

    Attributes
    ----------
    kind : str
        "iid", "dirichlet", "pathological", "fedphd" or "similarity".
    value : float
        Dirichlet's alpha, the number of classes per client, or the percentage of the data that is assigned IID; 0
        where the kind needs none.
    seed : int
        Changes the draw.
    min_size : int
        Smallest number of samples of a client in a Dirichlet partition.
    """

    kind: str = "iid"
    value: float = 0.0
    seed: int = 0
    min_size: int = 1

    def __str__(self) -> str:
        # repr has all digits: the draw depends on this text.
        number = str(int(self.value)) if float(self.value).is_integer() else repr(self.value)
        text = f"{self.kind}={number}" if self.value or self.kind == "similarity" else self.kind
        text += f",seed={self.seed}" if self.seed else ""
        return text + (f",min={self.min_size}" if self.min_size != 1 else "")

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read a scheme such as ``dirichlet=0.3,seed=7``; raises DataError on anything else."""
        head, *options = text.split(",")
        kind, equals, value_text = head.partition("=")
        fault = f"partition scheme {text!r} is not understood; give one of {SCHEMES}, then {_OPTIONS}"
        if kind == "iid" and not equals:
            value = 0.0
        elif kind == "dirichlet":
            value = _number(value_text, fault)
            if not value > 0:
                raise DataError(f"partition scheme {text!r}: dirichlet's alpha must be above 0")
        elif kind == "similarity":
            value = _number(value_text, fault)
            if not 0 <= value <= 100:
                raise DataError(f"partition scheme {text!r}: similarity is a percentage; give 0 to 100")
        elif kind in ("pathological", "fedphd"):
            value = _whole(value_text, fault) if equals or kind == "pathological" else 0
            if (equals or kind == "pathological") and value < 1:
                raise DataError(f"partition scheme {text!r}: a client needs at least 1 class")
        else:
            raise DataError(fault)
        given: dict[str, int] = {}
        for option in options:
            key, _, number = option.partition("=")
            if key not in ("seed", "min") or key in given or (key == "min" and kind != "dirichlet"):
                raise DataError(fault)
            given[key] = _whole(number, fault)
        if given.get("min", 1) < 1:
            raise DataError(f"partition scheme {text!r}: min must be at least 1 sample")
        return cls(kind, value, given.get("seed", 0), given.get("min", 1))


def _number(text: str, fault: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise DataError(fault) from None
    if not np.isfinite(value):
        raise DataError(fault)
    return value


def _whole(text: str, fault: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise DataError(fault)
    return int(text)


def assign(labels: NDArray[np.int64], clients: int, scheme: Scheme, *, name: str) -> NDArray[np.int64]:
    """Assign every sample to a client.

    Parameters
    ----------
    labels : ndarray
        Class of each sample, shape [N].
    clients : int
        Number of clients, at least 1.
    scheme : Scheme
        The partition scheme.
    name : str
        Name of the data set; the draw depends only on it, `clients` and `scheme`.

    Returns
    -------
    ndarray
        int64, shape [N]: the client of each sample. Only a pathological partition with fewer clients than classes
        can leave classes out (client -1, logged). Every client has at least one sample.

    Raises
    ------
    DataError
        A client would get no sample, or the scheme does not fit the data.
    """
    labels = np.asarray(labels, np.int64)
    where = f"data {name!r} in {clients} partitions by {scheme}"
    if clients < 1:
        raise DataError(f"data {name!r}: the number of partitions must be at least 1, not {clients}")
    if clients > len(labels):
        raise DataError(f"{where}: a client would get none of {len(labels)} samples; use fewer partitions")
    purpose = f"partition/{clients}/{scheme}"
    if scheme.kind == "fedphd":
        rng = rng_for(scheme.seed, name, 0, purpose)
        per_client = int(scheme.value) or (1 if name == "celeba" else 2)
        owner = _fedphd(labels, clients, per_client, rng, where)
    elif scheme.kind == "similarity":
        rng = rng_for(scheme.seed, name, 0, purpose)
        owner = _similarity(labels, clients, scheme.value / 100, rng)
    elif scheme.kind == "iid":
        owner = _iid(len(labels), clients, seed_for(scheme.seed, name, 0, purpose))
    else:
        owner = _skewed(labels, clients, scheme, seed_for(scheme.seed, name, 0, purpose), where)
    sizes = np.bincount(owner[owner >= 0], minlength=clients)
    if sizes.min() < 1:
        raise DataError(f"{where}: client {int(sizes.argmin())} would get no sample; use fewer partitions")
    left_out = sorted({int(label) for label in labels[owner < 0]})
    if left_out:
        log.warning("%s: classes %s belong to no client", where, left_out)
    return owner


def _iid(samples: int, clients: int, seed: int) -> NDArray[np.int64]:
    """Cut shuffled samples into blocks whose sizes differ by at most one."""
    owner = np.empty(samples, np.int64)
    for client, part in enumerate(np.array_split(_shuffled(samples, seed), clients)):
        owner[part] = client
    return owner


def _shuffled(samples: int, seed: int) -> NDArray[np.int64]:
    """Return the samples in random order: data sets are often sorted by class."""
    return np.random.default_rng(seed).permutation(samples)


def _skewed(
    labels: NDArray[np.int64], clients: int, scheme: Scheme, seed: int, where: str
) -> NDArray[np.int64]:
    """Draw a partition with label skew over shuffled samples."""
    order = _shuffled(len(labels), seed)
    draw = _dirichlet if scheme.kind == "dirichlet" else _pathological
    owner = np.full(len(labels), -1, np.int64)
    try:
        owner[order] = draw(labels[order], clients, scheme, np.random.default_rng(seed))
    except ValueError as error:
        raise DataError(
            f"{where} cannot be drawn: use fewer partitions, a larger alpha or another seed ({error})"
        ) from error
    return owner


def _dirichlet(
    labels: NDArray[np.int64], clients: int, scheme: Scheme, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Divide each class by proportions p ~ Dir(alpha) over the clients (Hsu et al., arXiv 1909.06335).

    Drawn again while a client has fewer than ``scheme.min_size`` samples.
    """
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    owner = np.empty(len(labels), np.int64)
    for _ in range(_DIRICHLET_DRAWS):
        for samples in classes:
            shares = rng.dirichlet(np.full(clients, scheme.value))
            ends = (np.cumsum(shares) * len(samples)).astype(int)
            ends[-1] = len(samples)
            owner[samples] = np.repeat(np.arange(clients), np.diff(ends, prepend=0))
        if np.bincount(owner, minlength=clients).min() >= scheme.min_size:
            return owner
    raise ValueError(f"in {_DIRICHLET_DRAWS} draws a client had fewer than {scheme.min_size} samples")


def _pathological(
    labels: NDArray[np.int64], clients: int, scheme: Scheme, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Give each client ``scheme.value`` classes, and each class in equal parts to its clients.

    The first class of client c is c mod classes, so with enough clients every class is assigned; the others are
    drawn uniformly. Samples of a class without a client are -1.
    """
    present, counts = np.unique(labels, return_counts=True)
    per_client = int(scheme.value)
    if per_client > len(present):
        raise ValueError(f"{per_client} classes per client, but the data have {len(present)}")
    chosen = np.zeros((clients, len(present)), bool)
    for client in range(clients):
        chosen[client, client % len(present)] = True
        while chosen[client].sum() < per_client:
            chosen[client, rng.choice(len(present), size=1)[0]] = True
    owner = np.full(len(labels), -1, np.int64)
    for place, (label, count) in enumerate(zip(present, counts, strict=True)):
        holders = np.flatnonzero(chosen[:, place])
        if len(holders) > count:
            raise ValueError(f"class {label} belongs to {len(holders)} clients and has {count} samples")
        if len(holders):
            parts = np.array_split(np.flatnonzero(labels == label), len(holders))
            for client, part in zip(holders.tolist(), parts, strict=True):
                owner[part] = client
    return owner


def _fedphd(
    labels: NDArray[np.int64], clients: int, per_client: int, rng: np.random.Generator, where: str
) -> NDArray[np.int64]:
    """Divide as FedPhD does (arXiv 2507.06449 and the authors' code).

    With several classes per client, each class is cut into s equal slices for s consecutive clients: class i goes
    to clients (s*i .. s*i + s - 1) mod N with s = ceil(per_client * N / classes). For 20 clients and 10
    classes, s = 4: client c holds classes c//4 and c//4 + 5. With one class per client (CelebA's layout), a
    class with a share p of the samples gets about p * N clients (see :func:`_clients_per_class`), and its
    samples are divided equally among them.
    """
    present, counts = np.unique(labels, return_counts=True)
    if per_client > len(present):
        raise DataError(f"{where}: {per_client} classes per client, but the data have {len(present)}")
    if per_client == 1:
        groups = _clients_per_class(counts, clients, where)
        starts = np.concatenate(([0], np.cumsum(groups)[:-1]))
    else:
        slices = -(-per_client * clients // len(present))
        groups = np.full(len(present), slices)
        starts = np.arange(len(present)) * slices
    owner = np.empty(len(labels), np.int64)
    for label, group, start in zip(present, groups, starts, strict=True):
        samples = rng.permutation(np.flatnonzero(labels == label))
        for offset, part in enumerate(np.array_split(samples, group)):
            owner[part] = (start + offset) % clients
    return owner


def _similarity(
    labels: NDArray[np.int64], clients: int, share: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Assign a share of the samples IID, the rest sorted by label (SCAFFOLD, arXiv 1910.06378, section 7).

    Both parts are cut into `clients` blocks whose sizes differ by at most one; of the sorted rest client i gets
    block i. The IID blocks are assigned in reverse, so that the longer blocks of both parts go to different clients
    where possible.
    """
    order = rng.permutation(len(labels))
    even = round(share * len(labels))
    rest = order[even:]
    rest = rest[np.argsort(labels[rest], kind="stable")]
    owner = np.empty(len(labels), np.int64)
    for client, part in enumerate(np.array_split(order[:even], clients)):
        owner[part] = clients - 1 - client
    for client, part in enumerate(np.array_split(rest, clients)):
        owner[part] = client
    return owner


def _clients_per_class(counts: NDArray[np.int64], clients: int, where: str) -> NDArray[np.int64]:
    """Return how many clients each class gets: ceil(N * share), lowered until the sum is N.

    The authors adjust the sum; that the class furthest above its share loses a client is our choice.
    """
    if clients < len(counts):
        raise DataError(f"{where}: one class per client needs at least {len(counts)} clients, one per class")
    exact: NDArray[np.float64] = clients * counts / counts.sum()
    groups: NDArray[np.int64] = np.ceil(exact).astype(np.int64)
    while groups.sum() > clients:
        over = np.where(groups > 1, groups - exact, -np.inf)
        groups[over.argmax()] -= 1
    return groups
