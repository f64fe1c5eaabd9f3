"""Half precision and back, several times quicker than NumPy, to the same bits.

NumPy converts number by number, and takes 45 times longer for one below 2**-14, which half precision holds as a
subnormal; and an update's differences are hardly ever larger. What is done here is a handful of its vectorised
operations, piece by piece, so that nothing between the numbers read and those written leaves the processor's cache.
"""

from __future__ import annotations

import numpy as np

#: Numbers of a piece: two buffers of 256 KiB.
PIECE = 1 << 16
LARGEST = np.float32(65504.0)
_INFINITY = 0x7C00
#: Float32 bits: the least number that half precision rounds to infinity, the exponent's, and that of 2**-14.
_OVERFLOW, _EXPONENT, _LEAST_NORMAL = 0x477FF000, np.uint32(0x7F800000), np.uint32(0x38800000)
#: Half precision has 13 bits less: 2**13 times a power of two lies as far from the next float32 as halves do there.
_WIDER = np.uint32(13 << 23)
_SHIFT, _SIGN_SHIFT, _SIGN = np.uint32(13), np.uint32(16), np.uint32(0x8000)
_BIAS = np.uint32((0x38800000 + (13 << 23)) >> 13)
#: What is left of a half, moved to a float32's sign, exponent and mantissa, and what its exponent's bias is short of.
_KEPT, _SHORT = np.int32(-0x70002000), np.float32(2.0**112)


def to_half(array: np.ndarray, out: np.ndarray | None = None, *, clip: bool = False) -> np.ndarray:
    """Round float32 numbers to half precision, to nearest with ties to even; same shape.

    Parameters
    ----------
    array : array
        Float32 numbers.
    out : array, optional
        C-contiguous float16 array of that shape to write to.
    clip : bool
        Whether what half precision cannot hold becomes its largest number instead of an infinity.
    """
    values = np.ascontiguousarray(array, np.float32).reshape(-1)
    half = np.empty(np.shape(array), np.float16) if out is None else out
    if half.shape != np.shape(array) or half.dtype != np.float16 or not half.flags.c_contiguous:
        raise ValueError("the array to write to is not one of half precision and of the same shape")
    flat = half.reshape(-1)
    size, exponent = (np.empty(min(PIECE, values.size), np.uint32) for _ in range(2))
    for start in range(0, values.size, PIECE):
        piece = values[start : start + PIECE]
        _round(piece, flat[start : start + PIECE], size[: len(piece)], exponent[: len(piece)], clip)
    return half


def _round(values: np.ndarray, half: np.ndarray, size: np.ndarray, exponent: np.ndarray, clip: bool) -> None:
    """Round a piece; `size` and `exponent` are room to work in.

    A number is added to 2**13 times its power of two, of which the least is 2**-14: so the processor rounds it to a
    multiple of what lies between two halves there, subnormal or not, and the sum's lowest bits count the multiples.
    """
    number = size.view(np.float32)
    np.abs(values, out=number)
    if size.max() >= _OVERFLOW:  # as bits, NaNs lie above the infinities
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
    """Widen half precision to float32, exactly; same shape.

    Parameters
    ----------
    array : array
        Half-precision numbers.
    out : array, optional
        C-contiguous float32 array of that shape to write to.
    """
    wide = np.empty(np.shape(array), np.float32) if out is None else out
    if wide.shape != np.shape(array) or wide.dtype != np.float32 or not wide.flags.c_contiguous:
        raise ValueError("the array to write to is not one of single precision and of the same shape")
    bits = np.ascontiguousarray(array, np.float16).reshape(-1).view(np.int16)
    flat = wide.reshape(-1)
    for start in range(0, bits.size, PIECE):
        piece, number = bits[start : start + PIECE], flat[start : start + PIECE]
        moved = number.view(np.int32)
        moved[...] = piece  # its sign is repeated up to the top
        moved <<= np.int32(_SHIFT)
        moved &= _KEPT
        if _largest(piece) < _INFINITY:
            number *= _SHORT  # also makes normal numbers of subnormal ones
        else:
            number[...] = piece.view(np.float16)
    return wide


def is_finite(array: np.ndarray) -> bool:
    """Tell whether no half-precision number is an infinity or NaN."""
    bits = np.ascontiguousarray(array, np.float16).reshape(-1).view(np.int16)
    return all(_largest(bits[start : start + PIECE]) < _INFINITY for start in range(0, bits.size, PIECE))


def _largest(bits: np.ndarray) -> int:
    """Return the largest bits but for the sign; those of infinities and NaNs lie above the finite numbers'."""
    return int((bits & np.int16(0x7FFF)).max())
