"""The data SPEC of the command line: a data set or folder, and a client's share of it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from espalier.data.imageset import ImageSet
from espalier.data.partition import Scheme, assign
from espalier.data.shares import Extras, RotatedImages, divide_test, hold_out, resize
from espalier.data.sources import NAMED, Source, Split, default_root, has_test, open_folder
from espalier.errors import DataError

GRAMMAR = (
    "NAME[:I/N[:SCHEME[+OPTION…]]] or FOLDER[:I/N[:SCHEME[+OPTION…]]], such as digits, "
    "mnist:2/8:dirichlet=0.3 or ./photos"
)

_SPEC = re.compile(r"(?P<source>.+?)(?::(?P<index>\d+)/(?P<clients>\d+)(?::(?P<scheme>[^:/\\]+))?)?")

_SHARE = re.compile(r":\d+/\d+(:|$)")

_PLUS = re.compile(r"\+(?=[a-z])")  # not the one of dirichlet=1e+2


@dataclass(frozen=True)
class DataSpec:
    """A parsed SPEC.

    Attributes
    ----------
    source : str
        A known name or a folder.
    index, clients : int
        Share `index` of `clients`, counted from 0; (0, 1) is the whole set.
    scheme : Scheme
        How the data are divided.
    extras : Extras
        Options of the share.
    """

    source: str
    index: int = 0
    clients: int = 1
    scheme: Scheme = field(default_factory=Scheme)
    extras: Extras = field(default_factory=Extras)

    @property
    def is_folder(self) -> bool:
        """Whether `source` is a folder, not a known name."""
        return _is_path(self.source)


def parse_spec(text: str) -> DataSpec:
    """Read a SPEC, without opening anything.

    Parameters
    ----------
    text : str
        ``NAME[:I/N[:SCHEME[+OPTION…]]]``, or a FOLDER in the place of NAME; I counts from 0. A folder
        contains a path separator or begins with ``.`` or ``~``.

    Raises
    ------
    DataError
        The text does not parse, the name is unknown, I is not below N, or an option does not fit the data.
    """
    match = _SPEC.fullmatch(text.strip())
    if match is None:
        raise DataError(f"data {text!r} is not understood; give {GRAMMAR}")
    source = match["source"]
    head, _, rest = source.partition(":")
    if (rest and (head in NAMED or not _is_path(source))) or _SHARE.search(source):
        raise DataError(f"data {text!r} is not understood; give {GRAMMAR}")
    if not _is_path(source) and source not in NAMED:
        hint = f", or ./{source} for the folder of that name" if Path(source).is_dir() else ""
        known = ", ".join(NAMED)
        raise DataError(f"data set {source!r} is not known; give one of {known}{hint} or a folder's path")
    if match["clients"] is None:
        return DataSpec(source)
    index, clients = int(match["index"]), int(match["clients"])
    if clients < 1:
        raise DataError(f"data {text!r}: the number of partitions must be at least 1")
    if index >= clients:
        raise DataError(f"data {text!r}: partitions of {clients} are numbered 0 to {clients - 1}")
    scheme, *options = _PLUS.split(match["scheme"] or "iid")
    extras = Extras.parse(options, text)
    if extras.holdout and not _is_path(source):
        raise DataError(f"data {text!r}: {source} has test images of its own; leave +holdout out")
    return DataSpec(source, index, clients, Scheme.parse(scheme), extras)


def open_data(
    spec: str,
    *,
    split: Split = "train",
    root: Path | None = None,
    size: int | None = None,
    channels: int | None = None,
    download: bool | None = None,
) -> ImageSet:
    """Open the images that a SPEC names.

    Parameters
    ----------
    spec : str
        See :func:`parse_spec`.
    split : {"train", "test"}
        Which split. A client's share of the test split has the label proportions of its training share.
    root : Path, optional
        Folder of the named data sets' files; by default ESPALIER_DATA or a cache folder.
    size : int, optional
        Height and width in pixels; by default those of a named set (CelebA: 64), or 32 for a folder.
    channels : int, optional
        1 or 3, for a folder; by default determined from its images.
    download : bool, optional
        Whether missing files may be downloaded; by default only if ESPALIER_DOWNLOAD is 1.

    Returns
    -------
    ImageSet
        The images, at least one.

    Raises
    ------
    DataError
        The SPEC does not parse, the data are missing or damaged, there is no test split, or the share would
        be empty.
    """
    share = _Share(spec, root, size, channels, download)
    if split == "train":
        return share.train()
    data = share.test()
    if data is None:
        raise DataError(
            f"data {spec!r}: the test split has no image for this partition; use fewer partitions or more images"
        )
    return data


def open_test(
    spec: str,
    *,
    root: Path | None = None,
    size: int | None = None,
    channels: int | None = None,
    download: bool | None = None,
) -> ImageSet | None:
    """Open the test images of a share as :func:`open_data` does, or return None if there can be none.

    There are none for a folder that has no test split, without ``+holdout``, and if the test split is too small to give
    every client a share. Damaged or missing data raise DataError here, too.
    """
    share = _Share(spec, root, size, channels, download)
    return share.test() if share.has_test() else None


#: Named sets that stay open within `sharing_sources`; None outside of it.
_shared: dict[tuple[str, Source], ImageSet] | None = None


@contextlib.contextmanager
def sharing_sources() -> Iterator[None]:
    """Within this context, open each split of a named data set only once for all of its shares.

    For a process with many clients: reading a set takes longer than taking a share of it. A resident client must not
    use it, because the whole set would stay in memory.
    """
    global _shared
    before = _shared
    _shared = {} if before is None else before
    try:
        yield
    finally:
        _shared = before


class _Share:
    """A SPEC's share of both splits; the training split is opened and divided once for both."""

    def __init__(
        self, text: str, root: Path | None, size: int | None, channels: int | None, download: bool | None
    ) -> None:
        self.spec, self.text = parse_spec(text), text
        if size is not None and size < 1:
            raise DataError(f"data {text!r}: the image size must be at least 1 pixel, not {size}")
        self.root, self.size, self.channels, self.download = root, size, channels, download

    def has_test(self) -> bool:
        """Whether the share can have test images."""
        spec = self.spec
        return not spec.is_folder or bool(spec.extras.holdout) or has_test(Path(spec.source).expanduser())

    def train(self) -> ImageSet:
        """Return the training images of the share."""
        data = self._division[0]
        extras = self.spec.extras
        if extras.holdout:
            data = data.subset(self._holdout(data)[0])
        if extras.shots or extras.scarce:
            data = data.subset(
                extras.thin(
                    data.labels, len(data.classes), seed=self.spec.scheme.seed, name=self._client(data.name)
                )
            )
        return self._rotated(data)

    def test(self) -> ImageSet | None:
        """Return the test images of the share, None if there are too few for every share to have one."""
        spec = self.spec
        if spec.extras.holdout:
            data = self._division[0]
            return self._rotated(data.subset(self._holdout(data)[1]))
        whole = self._open("test")
        if spec.clients == 1:
            return self._rotated(whole)
        if spec.scheme.kind == "iid" and not spec.extras.lognormal:
            # Every share has the proportions of the split, so the training images need not be opened.
            if len(whole) < spec.clients:
                return None
            owner = assign(whole.labels, spec.clients, spec.scheme, name=whole.name)
        else:
            _, labels, train_owner = self._division
            owner = divide_test(
                train_owner, labels, whole.labels, spec.clients, seed=spec.scheme.seed, name=whole.name
            )
        mine = np.flatnonzero(owner == spec.index)
        return self._rotated(whole.subset(mine)) if len(mine) else None

    @cached_property
    def _division(self) -> tuple[ImageSet, NDArray[np.int64], NDArray[np.int64]]:
        """The share's training images, and labels and owners of the whole training split."""
        spec, whole = self.spec, self._open("train")
        if spec.clients == 1:
            return whole, whole.labels, np.zeros(len(whole), np.int64)
        owner = assign(whole.labels, spec.clients, spec.scheme, name=whole.name)
        if spec.extras.lognormal:
            owner = resize(
                owner,
                whole.labels,
                spec.clients,
                spec.extras.lognormal,
                seed=spec.scheme.seed,
                name=whole.name,
                min_size=spec.scheme.min_size,
            )
        return whole.subset(np.flatnonzero(owner == spec.index)), whole.labels, owner

    def _holdout(self, data: ImageSet) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        name = self._client(data.name)
        return hold_out(data.labels, self.spec.extras.holdout, seed=self.spec.scheme.seed, name=name)

    def _client(self, data: str) -> str:
        return f"{data}/{self.spec.index}/{self.spec.clients}"

    def _rotated(self, data: ImageSet) -> ImageSet:
        steps = self.spec.extras.rotate
        quarters = self.spec.index % steps * (4 // steps)
        return RotatedImages(data, quarters) if quarters else data

    def _open(self, split: Split) -> ImageSet:
        spec = self.spec
        if spec.is_folder:
            folder = Path(spec.source).expanduser()
            if spec.extras.holdout and has_test(folder):
                raise DataError(f"data {self.text!r}: the folder has test images; leave +holdout out")
            return open_folder(folder, split=split, size=self.size, channels=self.channels)
        download = os.environ.get("ESPALIER_DOWNLOAD") == "1" if self.download is None else self.download
        where = self.root.expanduser() if self.root is not None else default_root()
        source = Source(split, where, download, self.size)
        if _shared is None:
            return NAMED[spec.source](source)
        key = (spec.source, source)
        if key not in _shared:
            _shared[key] = NAMED[spec.source](source)
        return _shared[key]


def _is_path(source: str) -> bool:
    return source.startswith((".", "~")) or "/" in source or os.sep in source
