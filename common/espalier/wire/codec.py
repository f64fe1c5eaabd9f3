"""The protocol of codecs for updates, and the codecs that code each number by itself: none, fp16 and bf16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

import numpy as np

from espalier.errors import EspalierError, WireError
from espalier.wire.half import from_half, is_finite, to_half
from espalier.wire.payload import STORED_AS, Layout, TensorSpec, Weights

Arrays = Mapping[str, np.ndarray]

_BF16_LARGEST = np.uint16(0x7F7F)
_BF16_EXPONENT = np.uint16(0x7F80)


class CodecError(EspalierError):
    """An update cannot be coded."""


class Codec(Protocol):
    """Encodes the differences local − received of the trained float32 tensors, in the order of a layout.

    The layout of the code depends on the settings and on the layout of the difference only, so a receiver knows the
    length of every coded array in advance. Counters and running statistics are not passed to a codec.
    """

    #: Value of the setting `codec`.
    name: ClassVar[str]
    #: Whether the expectation of the decoded update over `rng` is the update.
    unbiased: ClassVar[bool]
    #: Whether each tensor is coded independently, so that a sender may call `encode` per tensor.
    by_tensor: ClassVar[bool]
    #: Whether every code decodes to a value within ±`espalier.wire.payload.LARGEST`.
    bounded: ClassVar[bool]

    def encode(
        self, arrays: Arrays, rng: np.random.Generator, into: Arrays | None = None
    ) -> dict[str, np.ndarray]:
        """Return the coded arrays, with the layout ``self.layout(Layout.of(arrays))``.

        Parameters
        ----------
        arrays : mapping of str to array
            The differences, float32.
        rng : np.random.Generator
            Generator for stochastic rounding.
        into : mapping of str to array, optional
            C-contiguous arrays of that layout, to which the code is written; they are returned.

        Raises
        ------
        CodecError
            If a value is not finite.
        """

    def decode(
        self, coded: Arrays, like: Layout, sender: str, into: Arrays | None = None
    ) -> dict[str, np.ndarray]:
        """Return float32 arrays with the names, shapes and order of a layout: `into`, or newly allocated ones.

        Parameters
        ----------
        coded : mapping of str to array
            The received arrays.
        like : Layout
            The layout of the difference.
        sender : str
            Name of the sender, for error messages.
        into : mapping of str to array, optional
            C-contiguous arrays to which the values are written, and which are returned; their content after an error
            is undefined.

        Raises
        ------
        WireError
            If `coded` is not a possible result of `encode` for such arrays.
        """

    def layout(self, like: Layout) -> Layout:
        """Return the layout of the coded arrays of a difference with the layout `like`."""


class Whole:
    """The identity: sends float32 values unchanged."""

    name: ClassVar[str] = "none"
    unbiased: ClassVar[bool] = True
    by_tensor: ClassVar[bool] = True
    bounded: ClassVar[bool] = False

    def encode(
        self, arrays: Arrays, rng: np.random.Generator, into: Arrays | None = None
    ) -> dict[str, np.ndarray]:
        """Return the arrays themselves."""
        check_numbers(arrays)
        return filled(arrays, into)

    def decode(
        self, coded: Arrays, like: Layout, sender: str, into: Arrays | None = None
    ) -> dict[str, np.ndarray]:
        """Return copies of the arrays."""
        check_coded(coded, self.layout(like), sender)
        return filled(
            {t.name: coded[t.name] for t in like.tensors}, empty_arrays(like) if into is None else into
        )

    def layout(self, like: Layout) -> Layout:
        """Return the same names and shapes in float32."""
        return _retyped(like, "float32")


class Float16:
    """IEEE half precision, rounded to nearest: half the bytes.

    Values beyond ±65504 are clipped to ±65504 instead of overflowing: a difference that large is rare, and clipping
    one coordinate is better than losing the whole update. Values below 3e-8 underflow to zero; `bf16` preserves them.
    """

    name: ClassVar[str] = "fp16"
    unbiased: ClassVar[bool] = False
    by_tensor: ClassVar[bool] = True
    bounded: ClassVar[bool] = True

    def encode(
        self, arrays: Arrays, rng: np.random.Generator, into: Arrays | None = None
    ) -> dict[str, np.ndarray]:
        """Return float16 arrays."""
        check_numbers(arrays)
        halves = empty_arrays(self.layout(Layout.of(arrays))) if into is None else into
        return {name: to_half(a, halves[name], clip=True) for name, a in arrays.items()}

    def decode(
        self, coded: Arrays, like: Layout, sender: str, into: Arrays | None = None
    ) -> dict[str, np.ndarray]:
        """Convert to float32, which is exact."""
        check_coded(coded, self.layout(like), sender)
        wide = empty_arrays(like) if into is None else into
        return {t.name: from_half(coded[t.name], wide[t.name]) for t in like.tensors}

    def layout(self, like: Layout) -> Layout:
        """Return the same names and shapes in float16."""
        return _retyped(like, "float16")


class BFloat16:
    """bfloat16: the range of float32 with 8 significant bits, rounded to nearest with ties to even.

    Values that would round to infinity are clipped to the largest finite value, as in :class:`Float16`.
    """

    name: ClassVar[str] = "bf16"
    unbiased: ClassVar[bool] = False
    by_tensor: ClassVar[bool] = True
    bounded: ClassVar[bool] = False

    def encode(
        self, arrays: Arrays, rng: np.random.Generator, into: Arrays | None = None
    ) -> dict[str, np.ndarray]:
        """Return the bfloat16 bits as uint16, the representation of bfloat16 in a payload."""
        check_numbers(arrays)
        return filled({name: _to_bfloat16(a) for name, a in arrays.items()}, into)

    def decode(
        self, coded: Arrays, like: Layout, sender: str, into: Arrays | None = None
    ) -> dict[str, np.ndarray]:
        """Convert to float32, which is exact."""
        check_coded(coded, self.layout(like), sender)
        wide = empty_arrays(like) if into is None else into
        for tensor in like.tensors:
            bits = wide[tensor.name].view(np.uint32)
            bits[...] = coded[tensor.name]
            bits <<= np.uint32(16)
        return {t.name: wide[t.name] for t in like.tensors}

    def layout(self, like: Layout) -> Layout:
        """Return the same names and shapes in bfloat16."""
        return _retyped(like, "bfloat16")


# --- for codecs ------------------------------------------------------------------------------------


def check_numbers(arrays: Arrays) -> None:
    """Check that an update is finite, before clipping or rounding can hide a value that is not.

    Raises
    ------
    CodecError
        If a value is not finite.
    ValueError
        If an array is not float32.
    """
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise ValueError(f"tensor {name!r} of an update is {array.dtype}; codecs take float32")
        if not np.isfinite(array).all():
            raise CodecError(
                f"the update of tensor {name!r} holds a value that is not finite, so it is not sent; "
                "lower learning-rate, or set clip-norm=1 or precision=fp32"
            )


def check_coded(coded: Arrays, layout: Layout, sender: str) -> None:
    """Check that coded arrays have the names, dtypes and shapes of a layout, and finite values.

    Raises
    ------
    WireError
        With the first fault found.
    """
    expected = {t.name: t for t in layout.tensors}
    if set(coded) != set(expected):
        name = sorted(set(coded) ^ set(expected))[0]
        raise WireError(sender, f"coded array {name!r} is {'missing' if name in expected else 'superfluous'}")
    for name, tensor in expected.items():
        array = coded[name]
        if array.dtype != STORED_AS[tensor.dtype] or array.shape != tensor.shape:
            raise WireError(
                sender,
                f"coded array {name!r} is {array.dtype}{list(array.shape)}, "
                f"expected {tensor.dtype}{list(tensor.shape)}",
            )
        if tensor.dtype == "bfloat16":
            finite = ((array & _BF16_EXPONENT) != _BF16_EXPONENT).all()
        elif tensor.dtype == "float16":
            finite = is_finite(array)
        else:
            finite = array.dtype.kind != "f" or np.isfinite(array).all()
        if not finite:
            raise WireError(sender, f"coded array {name!r} holds a value that is not finite")


def empty_arrays(like: Layout) -> dict[str, np.ndarray]:
    """Return uninitialised arrays of a layout; one allocation for all causes fewer page faults than one per tensor."""
    return Weights.empty(like).views()


def filled(arrays: Arrays, into: Arrays | None) -> dict[str, np.ndarray]:
    """Return arrays, or copy them to `into` and return that."""
    if into is None:
        return dict(arrays)
    for name, array in arrays.items():
        np.copyto(into[name], array)
    return {name: into[name] for name in arrays}


def flatten(arrays: Arrays) -> np.ndarray:
    """Return an update as one new float32 vector, checked with :func:`check_numbers`."""
    check_numbers(arrays)
    parts = [a.reshape(-1) for a in arrays.values()]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def unflatten(flat: np.ndarray, like: Layout) -> dict[str, np.ndarray]:
    """Return the tensors of a flat update as views."""
    arrays, start = {}, 0
    for tensor in like.tensors:
        arrays[tensor.name] = flat[start : start + tensor.size].reshape(tensor.shape)
        start += tensor.size
    return arrays


def numbers(like: Layout) -> int:
    """Return d, the number of elements of an update."""
    return sum(t.size for t in like.tensors)


def _retyped(like: Layout, dtype: str) -> Layout:
    return Layout(tuple(TensorSpec(t.name, dtype, t.shape) for t in like.tensors))


def _to_bfloat16(array: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
    # Round half to even: adding 0x7FFF, and 1 more if the lowest bit of the upper half is set, carries into the
    # upper half exactly if the nearest bfloat16 (on a tie: the even one) is the next larger.
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    half = (rounded >> np.uint32(16)).astype(np.uint16).reshape(array.shape)
    overflow = (half & _BF16_EXPONENT) == _BF16_EXPONENT
    return np.where(overflow, (half & np.uint16(0x8000)) | _BF16_LARGEST, half)
