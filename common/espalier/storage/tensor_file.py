"""Named arrays in a safetensors file, replaced atomically and protected by a checksum."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from espalier.errors import StateError
from espalier.storage.atomic import replacing, write_error

_CHECKSUM = "crc32"


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Replace the file at `path` with `tensors`; see :func:`espalier.storage.atomic.replacing`.

    Raises
    ------
    StateError
        The file cannot be written.
    """
    arrays = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in tensors.items()}
    try:
        with replacing(path) as temporary:
            save_file(arrays, temporary, metadata={_CHECKSUM: _checksum(arrays)})
    except SafetensorError as error:
        raise write_error(path, error) from error


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a file that :func:`write_tensors` wrote.

    Raises
    ------
    StateError
        The file is missing or truncated, or its checksum does not match.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            checksum = (file.metadata() or {}).get(_CHECKSUM)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise StateError(f"{path} is damaged ({error}); remove it to continue from an older one") from error
    if checksum != _checksum(tensors):
        raise StateError(f"{path} is damaged (its checksum differs); remove it to continue from an older one")
    return tensors


def _checksum(tensors: Mapping[str, np.ndarray]) -> str:
    # CRC-32 finds damage, several times faster than a digest on a board; forgery is not the concern here.
    value = 0
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        value = zlib.crc32(f"{name}:{array.dtype.name}:{np.shape(tensors[name])}".encode(), value)
        value = zlib.crc32(array.reshape(-1).view(np.uint8).data, value) if array.size else value
    return f"{value:08x}"
