"""The data SPEC of the command line: which data set or folder, and which share of it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.data.imageset import ImageSet
from common.data.partition import Scheme, assign_apart
from common.data.sources import NAMED, Source, Split, default_root, open_folder
from common.errors import DataError

GRAMMAR = "NAME[:I/N[:SCHEME]] or FOLDER[:I/N[:SCHEME]], such as digits, mnist:2/8:dirichlet=0.3 or ./photos"

_SPEC = re.compile(r"(?P<source>.+?)(?::(?P<index>\d+)/(?P<clients>\d+)(?::(?P<scheme>[^:/\\]+))?)?")

_SHARE = re.compile(r":\d+/\d+(:|$)")


@dataclass(frozen=True)
class DataSpec:
    """A parsed SPEC.

    Attributes
    ----------
    source : str
        A known name or a folder.
    index, clients : int
        Share `index` of `clients`, counted from 0; (0, 1) is the whole.
    scheme : Scheme
        How the data are divided.
    """

    source: str
    index: int = 0
    clients: int = 1
    scheme: Scheme = field(default_factory=Scheme)

    @property
    def is_folder(self) -> bool:
        """Whether `source` is a folder and not a known name."""
        return _is_path(self.source)


def known_data() -> tuple[str, ...]:
    """Return the names of the data sets that are known by name."""
    return tuple(NAMED)


def parse_spec(text: str) -> DataSpec:
    """Read a SPEC, without opening anything.

    Parameters
    ----------
    text : str
        ``NAME[:I/N[:SCHEME]]`` or ``FOLDER[:I/N[:SCHEME]]``; I counts from 0. A folder is what has a path
        separator or begins with ``.`` or ``~``.

    Raises
    ------
    DataError
        The text does not parse, the name is unknown, or I is not below N.
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
    return DataSpec(source, index, clients, Scheme.parse(match["scheme"]) if match["scheme"] else Scheme())


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
        Which split; a share is taken of each split in the same way.
    root : Path, optional
        Folder of the named data sets' files; ESPALIER_DATA or a cache folder unless given.
    size : int, optional
        Height and width in pixels; a named set's own (CelebA: 64) or 32 for a folder unless given.
    channels : int, optional
        1 or 3, for a folder; by its images unless given.
    download : bool, optional
        Whether missing files may be downloaded; unless given, only where ESPALIER_DOWNLOAD is 1.

    Returns
    -------
    ImageSet
        The images, at least one.

    Raises
    ------
    DataError
        The SPEC does not parse, the data are missing or damaged, or the share would be empty.
    """
    parsed = parse_spec(spec)
    if size is not None and size < 1:
        raise DataError(f"data {spec!r}: the image size must be at least 1 pixel, not {size}")
    data: ImageSet
    if parsed.is_folder:
        data = open_folder(Path(parsed.source).expanduser(), split=split, size=size, channels=channels)
    else:
        if download is None:
            download = os.environ.get("ESPALIER_DOWNLOAD") == "1"
        where = root.expanduser() if root is not None else default_root()
        data = NAMED[parsed.source](Source(split, where, download, size))
    if parsed.clients == 1:
        return data
    owner = assign_apart(data.labels, parsed.clients, parsed.scheme, name=data.name)
    return data.subset(np.flatnonzero(owner == parsed.index))


def _is_path(source: str) -> bool:
    return source.startswith((".", "~")) or "/" in source or os.sep in source
