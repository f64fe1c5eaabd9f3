"""Who holds which sample: seeded partitions of a labelled data set, the same in every process.

A client computes the partition by itself from (data name, number of clients, scheme): nobody hands shares
out. flwr-datasets draws Dirichlet and pathological partitions; FedPhD's own layouts and SCAFFOLD's similarity
are here, and iid, whose blocks are flwr-datasets' without the seconds that it takes to import.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from espalier.errors import DataError
from espalier.seeds import rng_for, seed_for

log = logging.getLogger(__name__)

SCHEMES = "iid, dirichlet=ALPHA, pathological=CLASSES, fedphd or fedphd=CLASSES, similarity=PERCENT"
#: Those that flwr-datasets draws.
_FLOWERS = ("dirichlet", "pathological")
_OPTIONS = "seed=S and, for dirichlet, min=SAMPLES"


@dataclass(frozen=True)
class Scheme:
    """A way to divide data among clients: `kind` with its `value`, and a seed.

    Attributes
    ----------
    kind : str
        "iid", "dirichlet", "pathological", "fedphd" or "similarity".
    value : float
        Dirichlet's alpha, the number of classes a client, or the percentage of the data that is dealt IID; 0
        where the kind needs none.
    seed : int
        Changes the draw.
    min_size : int
        Fewest samples a client of a Dirichlet partition may get.
    """

    kind: str = "iid"
    value: float = 0.0
    seed: int = 0
    min_size: int = 1

    def __str__(self) -> str:
        # repr keeps every digit: the text is what a client's process and its helper agree on.
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
    """Give every sample an owner.

    Parameters
    ----------
    labels : ndarray
        Class of each sample, shape [N].
    clients : int
        Number of clients, at least 1.
    scheme : Scheme
        How to divide.
    name : str
        Name of the data set; the draw depends on it, on `clients` and on `scheme`, and on nothing else.

    Returns
    -------
    ndarray
        int64, shape [N]: the client of each sample. Every sample has one owner; only a pathological partition
        whose clients are fewer than the classes can leave classes out (owner -1, logged). Every client has
        at least one sample.

    Raises
    ------
    DataError
        A client would get no sample, the scheme does not fit the data, or flwr-datasets is not installed.
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
        owner = _flower(labels, clients, scheme, seed_for(scheme.seed, name, 0, purpose), where)
    sizes = np.bincount(owner[owner >= 0], minlength=clients)
    if sizes.min() < 1:
        raise DataError(f"{where}: client {int(sizes.argmin())} would get no sample; use fewer partitions")
    left_out = sorted({int(label) for label in labels[owner < 0]})
    if left_out:
        log.warning("%s: classes %s belong to no client", where, left_out)
    return owner


def _iid(samples: int, clients: int, seed: int) -> NDArray[np.int64]:
    """Cut shuffled samples in blocks that differ by one at most, as flwr-datasets' IidPartitioner cuts rows."""
    owner = np.empty(samples, np.int64)
    for client, part in enumerate(np.array_split(_shuffled(samples, seed), clients)):
        owner[part] = client
    return owner


def _shuffled(samples: int, seed: int) -> NDArray[np.int64]:
    """Return the samples in a drawn order: data sets often lie sorted by class."""
    return np.random.default_rng(seed).permutation(samples)


def _flower(
    labels: NDArray[np.int64], clients: int, scheme: Scheme, seed: int, where: str
) -> NDArray[np.int64]:
    """Draw a partition with flwr-datasets."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the labels are at hand: nothing may be asked of a hub
    try:
        from datasets import Dataset
        from flwr_datasets import partitioner as flower
    except ImportError as error:
        raise DataError(
            f"{where} needs flwr-datasets: install Espalier with its 'testbed' extra "
            "(pip install 'espalier-fl[testbed]')"
        ) from error
    made: dict[str, Callable[[], flower.Partitioner]] = {
        "dirichlet": lambda: flower.DirichletPartitioner(
            clients, "label", scheme.value, min_partition_size=scheme.min_size, shuffle=False, seed=seed
        ),
        # The first class of client c is c mod classes: with enough clients no class stays unowned.
        "pathological": lambda: flower.PathologicalPartitioner(
            clients, "label", int(scheme.value), "first-deterministic", shuffle=False, seed=seed
        ),
    }
    order = _shuffled(len(labels), seed)
    owner = np.full(len(labels), -1, np.int64)
    try:
        partitioner = made[scheme.kind]()
        partitioner.dataset = Dataset.from_dict({"label": labels[order], "index": order})
        with warnings.catch_warnings():
            # It warns of repeated draws, which are no fault, and of unused classes, which assign reports.
            warnings.simplefilter("ignore")
            for client in range(clients):
                owner[np.asarray(partitioner.load_partition(client)["index"], np.int64)] = client
    except ValueError as error:
        raise DataError(
            f"{where} cannot be drawn: use fewer partitions, a larger alpha or another seed "
            f"({' '.join(str(error).split())})"
        ) from error
    return owner


def _fedphd(
    labels: NDArray[np.int64], clients: int, per_client: int, rng: np.random.Generator, where: str
) -> NDArray[np.int64]:
    """Divide as FedPhD does (arXiv 2507.06449 and the authors' code).

    With several classes a client, each class is cut in s equal slices for s clients in a row: class i goes
    to clients (s*i .. s*i + s - 1) mod N with s = ceil(per_client * N / classes). For 20 clients and 10
    classes, s = 4: client c holds classes c//4 and c//4 + 5. With one class a client (CelebA's layout), a
    class with a share p of the samples gets about p * N clients (see :func:`_clients_per_class`), and its
    samples are cut equally among them.
    """
    present, counts = np.unique(labels, return_counts=True)
    if per_client > len(present):
        raise DataError(f"{where}: {per_client} classes a client, but the data have {len(present)}")
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
    """Deal a share of the samples IID, the rest sorted by label (SCAFFOLD, arXiv 1910.06378, section 7).

    Both parts are cut in `clients` blocks that differ by a sample at most; of the sorted rest client i gets
    block i. The blocks that are a sample longer are other clients' in the two parts, as far as that goes.
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

    The authors adjust the sum; that the class with the most clients over its share gives way is our choice.
    """
    if clients < len(counts):
        raise DataError(f"{where}: one class a client needs at least {len(counts)} clients, one a class")
    exact: NDArray[np.float64] = clients * counts / counts.sum()
    groups: NDArray[np.int64] = np.ceil(exact).astype(np.int64)
    while groups.sum() > clients:
        over = np.where(groups > 1, groups - exact, -np.inf)
        groups[over.argmax()] -= 1
    return groups


def assign_apart(labels: NDArray[np.int64], clients: int, scheme: Scheme, *, name: str) -> NDArray[np.int64]:
    """Do what :func:`assign` does, in a short-lived process where it would load flwr-datasets.

    Importing flwr-datasets costs about 120 MB that a resident client would hold for good. The newest draws
    are remembered: whoever opens several shares of one data set draws once.
    """
    labels = np.asarray(labels, np.int64)
    key = (hashlib.sha256(labels.tobytes()).hexdigest(), clients, str(scheme))
    if key not in _DRAWN:
        while len(_DRAWN) >= _REMEMBERED:
            _DRAWN.pop(next(iter(_DRAWN)), None)
        _DRAWN[key] = _assign_apart(labels, clients, scheme, name)
    return _DRAWN[key].copy()


#: Newest draws by labels, clients and scheme, and how many are kept.
_DRAWN: dict[tuple[str, int, str], NDArray[np.int64]] = {}
_REMEMBERED = 8


def _assign_apart(labels: NDArray[np.int64], clients: int, scheme: Scheme, name: str) -> NDArray[np.int64]:
    if scheme.kind not in _FLOWERS or "flwr_datasets" in sys.modules:
        return assign(labels, clients, scheme, name=name)
    stdin = io.BytesIO()
    np.save(stdin, labels, allow_pickle=False)
    task = json.dumps({"clients": clients, "scheme": str(scheme), "name": name})
    top = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (top, os.environ.get("PYTHONPATH", ""))))
    # -P: a folder named `common` where the user happens to stand must not be taken for ours.
    done = subprocess.run(
        [sys.executable, "-P", "-m", "espalier.data.partition", task],
        input=stdin.getvalue(),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode == DataError.exit_code:
        raise DataError(said)
    if done.returncode != 0:
        why = said or f"exit status {done.returncode}"
        raise DataError(f"data {name!r}: drawing the partition failed: {why}")
    if said:
        log.warning("%s", said)
    return np.asarray(np.load(io.BytesIO(done.stdout), allow_pickle=False), np.int64)


def _main() -> None:
    logging.basicConfig(format="%(message)s")
    task = json.loads(sys.argv[1])
    labels = np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False)
    try:
        owner = assign(labels, task["clients"], Scheme.parse(task["scheme"]), name=task["name"])
    except DataError as error:
        print(error, file=sys.stderr)
        sys.exit(DataError.exit_code)
    answer = io.BytesIO()
    np.save(answer, owner, allow_pickle=False)
    sys.stdout.buffer.write(answer.getvalue())


if __name__ == "__main__":
    _main()
