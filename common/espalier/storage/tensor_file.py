"""Named arrays in a safetensors file that is written whole or not at all, and whose damage is noticed."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from espalier.errors import StateError

_CHECKSUM = "crc32"


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write `tensors` to `path` by way of a temporary file and a rename; an old file is replaced.

    Raises
    ------
    StateError
        The folder cannot be written to.
    """
    arrays = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in tensors.items()}
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, partial, metadata={_CHECKSUM: _checksum(arrays)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StateError(f"cannot write {path}: {error}; see to space and rights there") from error


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read what `write_tensors` wrote.

    Raises
    ------
    StateError
        The file is absent, truncated, or its content is not what was written.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            checksum = (file.metadata() or {}).get(_CHECKSUM)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise StateError(f"{path} is damaged ({error}); remove it to go on from an older one") from error
    if checksum != _checksum(tensors):
        raise StateError(f"{path} is damaged (its checksum differs); remove it to go on from an older one")
    return tensors


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(tensors: Mapping[str, np.ndarray]) -> str:
    # CRC-32 finds damage, several times faster than a digest on a board; forgery is not the concern here.
    value = 0
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        value = zlib.crc32(f"{name}:{array.dtype.name}:{np.shape(tensors[name])}".encode(), value)
        value = zlib.crc32(array.reshape(-1).view(np.uint8).data, value) if array.size else value
    return f"{value:08x}"
