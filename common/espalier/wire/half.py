"""Conversion between float32 and float16 with the results of NumPy, several times faster.

NumPy converts element by element, and takes 45 times longer for values below 2**-14, which are subnormal in half
precision; most differences of an update are that small. Here a conversion is a few vectorised operations, done in
blocks, so that the temporary arrays stay in the processor's cache.
"""

from __future__ import annotations

import numpy as np

#: Elements of a block: two buffers of 256 KiB.
PIECE = 1 << 16
LARGEST = np.float32(65504.0)
_INFINITY = 0x7C00
#: Float32 bits: the smallest value that rounds to infinity in half precision, the exponent's mask, and 2**-14.
_OVERFLOW, _EXPONENT, _LEAST_NORMAL = 0x477FF000, np.uint32(0x7F800000), np.uint32(0x38800000)
#: A float16 has 13 mantissa bits less: the spacing of float32 at 2**13·x is that of float16 at x, x a power of two.
_WIDER = np.uint32(13 << 23)
_SHIFT, _SIGN_SHIFT, _SIGN = np.uint32(13), np.uint32(16), np.uint32(0x8000)
_BIAS = np.uint32((0x38800000 + (13 << 23)) >> 13)
#: Mask of a float16's bits shifted to their positions in a float32; 2 to the difference of the two exponent biases.
_SHIFTED_MASK, _BIAS_SCALE = np.int32(-0x70002000), np.float32(2.0**112)


def to_half(array: np.ndarray, out: np.ndarray | None = None, *, clip: bool = False) -> np.ndarray:
    """Round a float32 array to half precision, to nearest with ties to even.

    Parameters
    ----------
    array : array
        float32, any shape.
    out : array, optional
        C-contiguous float16 array of the same shape, to which the result is written.
    clip : bool
        Whether values beyond the range of half precision become its largest value instead of an infinity.

    Returns
    -------
    array
        float16, of the same shape.

    Raises
    ------
    ValueError
        If `out` is of another dtype or shape, or not C-contiguous.
    """
    values = np.ascontiguousarray(array, np.float32).reshape(-1)
    half = np.empty(np.shape(array), np.float16) if out is None else out
    if half.shape != np.shape(array) or half.dtype != np.float16 or not half.flags.c_contiguous:
        raise ValueError("`out` is not a C-contiguous float16 array of the same shape")
    flat = half.reshape(-1)
    size, exponent = (np.empty(min(PIECE, values.size), np.uint32) for _ in range(2))
    for start in range(0, values.size, PIECE):
        piece = values[start : start + PIECE]
        _round(piece, flat[start : start + PIECE], size[: len(piece)], exponent[: len(piece)], clip)
    return half


def _round(values: np.ndarray, half: np.ndarray, size: np.ndarray, exponent: np.ndarray, clip: bool) -> None:
    """Round a block; `size` and `exponent` are scratch buffers.

    The absolute value is added to 2**13 times its power of two (at least 2**-14). The floating-point addition rounds it
    to a multiple of the spacing of float16 there, subnormal or not, and the lowest bits of the sum are the multiple.
    """
    number = size.view(np.float32)
    np.abs(values, out=number)
    if size.max() >= _OVERFLOW:  # compared as integers, NaNs are above infinity
        with np.errstate(over="ignore"):
            half[...] = np.clip(values, -LARGEST, LARGEST) if clip else values
        return
    np.bitwise_and(size, _EXPONENT, out=exponent)
    np.maximum(exponent, _LEAST_NORMAL, out=exponent)
    exponent += _WIDER
    number += exponent.view(np.float32)
    size -= exponent
    exponent >>= _SHIFT
    exponent -= _BIAS
    size += exponent  # 1024 multiples carry into the exponent
    np.right_shift(values.view(np.uint32), _SIGN_SHIFT, out=exponent)
    exponent &= _SIGN
    size |= exponent
    half.view(np.uint16)[...] = size


def from_half(array: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Convert a float16 array to float32, which is exact.

    Parameters
    ----------
    array : array
        float16, any shape.
    out : array, optional
        C-contiguous float32 array of the same shape, to which the result is written.

    Returns
    -------
    array
        float32, of the same shape.

    Raises
    ------
    ValueError
        If `out` is of another dtype or shape, or not C-contiguous.
    """
    wide = np.empty(np.shape(array), np.float32) if out is None else out
    if wide.shape != np.shape(array) or wide.dtype != np.float32 or not wide.flags.c_contiguous:
        raise ValueError("`out` is not a C-contiguous float32 array of the same shape")
    bits = np.ascontiguousarray(array, np.float16).reshape(-1).view(np.int16)
    flat = wide.reshape(-1)
    for start in range(0, bits.size, PIECE):
        piece, number = bits[start : start + PIECE], flat[start : start + PIECE]
        moved = number.view(np.int32)
        moved[...] = piece  # sign-extended
        moved <<= np.int32(_SHIFT)
        moved &= _SHIFTED_MASK
        if _largest(piece) < _INFINITY:
            number *= _BIAS_SCALE  # also normalises subnormal values
        else:
            number[...] = piece.view(np.float16)
    return wide


def is_finite(array: np.ndarray) -> bool:
    """Return whether all values of a float16 array are finite."""
    bits = np.ascontiguousarray(array, np.float16).reshape(-1).view(np.int16)
    return all(_largest(bits[start : start + PIECE]) < _INFINITY for start in range(0, bits.size, PIECE))


def _largest(bits: np.ndarray) -> int:
    """Return the largest bit pattern without the sign; infinities and NaNs have larger ones than finite values."""
    return int((bits & np.int16(0x7FFF)).max())
