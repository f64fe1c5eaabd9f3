"""Packing of integer codes of 1 to 24 bits without padding, for quantised updates."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

#: Maximum bits of a code: a float32 has 24 significant bits, so wider codes would not be more accurate.
MAX_WIDTH = 24
#: Groups of eight codes that are processed at a time, so that the temporary arrays stay in cache.
_GROUPS = 1 << 14


def packed_size(count: int, width: int) -> int:
    """Return the bytes that `count` codes of `width` bits take: ceil(count · width / 8)."""
    return -(-count * width // 8)


def code_dtype(width: int) -> np.dtype[np.generic]:
    """Return the smallest unsigned dtype that holds a code of `width` bits."""
    return np.dtype(np.uint8 if width <= 8 else np.uint16 if width <= 16 else np.uint32)


def pack(codes: np.ndarray, width: int) -> np.ndarray:
    """Concatenate the bits of codes, each with its most significant bit first.

    Parameters
    ----------
    codes : np.ndarray
        Unsigned integers below ``2**width``, shape (count,).
    width : int
        Bits per code, 1 to `MAX_WIDTH`.

    Returns
    -------
    np.ndarray
        uint8, shape (ceil(count · width / 8),); the unused bits of the last byte are zero.
    """
    size = packed_size(len(codes), width)
    packed = np.empty(-(-len(codes) // 8) * width, np.uint8)
    for first in range(0, len(packed), _GROUPS * width):
        start = first // width * 8
        part = codes[start : start + 8 * _GROUPS]
        # Eight codes take exactly `width` bytes, so byte and shift depend only on the position in the group.
        group = np.zeros((-(-len(part) // 8), 8), np.uint32)
        group.reshape(-1)[: len(part)] = part
        out = np.zeros((len(group), width), np.uint8)
        for place, byte, left in _overlaps(width):
            column = group[:, place] << left if left >= 0 else group[:, place] >> -left
            out[:, byte] |= (column & 0xFF).astype(np.uint8)
        packed[first : first + out.size] = out.reshape(-1)
    return packed[:size]


def unpack(packed: np.ndarray, count: int, width: int) -> np.ndarray:
    """Return the codes that :func:`pack` packed.

    Parameters
    ----------
    packed : np.ndarray
        uint8, shape (ceil(count · width / 8),).
    count : int
        Number of codes.
    width : int
        Bits per code.

    Returns
    -------
    np.ndarray
        Codes of dtype ``code_dtype(width)``, shape (count,).

    Raises
    ------
    ValueError
        If the number of bytes is wrong, or a bit after the last code is set.
    """
    if len(packed) != packed_size(count, width):
        raise ValueError(f"{len(packed)} bytes for {count} codes of {width} bits")
    if (spare := len(packed) * 8 - count * width) and packed[-1] & ((1 << spare) - 1):
        raise ValueError("bits are set after the last code")
    codes = np.empty(count, code_dtype(width))
    for start in range(0, count, 8 * _GROUPS):
        out = codes[start : start + 8 * _GROUPS]
        part = packed[start // 8 * width :][: _GROUPS * width]
        group = np.zeros((-(-len(out) // 8), width), np.uint32)
        group.reshape(-1)[: len(part)] = part
        values = np.zeros((len(group), 8), np.uint32)
        for place, byte, left in _overlaps(width):
            values[:, place] |= group[:, byte] >> left if left >= 0 else group[:, byte] << -left
        values &= np.uint32((1 << width) - 1)
        out[:] = values.reshape(-1)[: len(out)]
    return codes


def _overlaps(width: int) -> Iterator[tuple[int, int, int]]:
    """Yield (position of the code in its group, byte of the group, left shift) for every code and byte that overlap."""
    for place in range(8):
        end = (place + 1) * width
        for byte in range(place * width // 8, -(-end // 8)):
            yield place, byte, (byte + 1) * 8 - end
