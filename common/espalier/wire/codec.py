"""How a client's update is coded for the link: whole, in half precision, quantised or sparse."""

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
    """Codes the difference local − received of the trained tensors, float32, in the order of a layout.

    What decides is in the settings and the layout alone, so a receiver knows the length of every
    coded array before it looks at one. Counters and running statistics never come in here.
    """

    #: Value of the setting `codec`.
    name: ClassVar[str]
    #: Whether the decoded update is the update in expectation over `rng`.
    unbiased: ClassVar[bool]
    #: Whether it codes each tensor by itself, so that a sender may give it one after another.
    by_tensor: ClassVar[bool]
    #: Whether no code stands for a number too large to be added up.
    bounded: ClassVar[bool]

    def encode(
        self, arrays: Arrays, rng: np.random.Generator, into: Arrays | None = None
    ) -> dict[str, np.ndarray]:
        """Return what goes on the wire, arrays that fit ``self.layout(Layout.of(arrays))``.

        Parameters
        ----------
        arrays : mapping of str to array
            The differences, float32.
        rng : np.random.Generator
            Where a number is rounded at random.
        into : mapping of str to array, optional
            C-contiguous arrays of that layout to write to and return.

        Raises
        ------
        CodecError
            If a number is not finite.
        """

    def decode(
        self, coded: Arrays, like: Layout, sender: str, into: Arrays | None = None
    ) -> dict[str, np.ndarray]:
        """Return float32 arrays of the layout's names and shapes, in its order, that are the caller's own.

        Parameters
        ----------
        coded : mapping of str to array
            What came.
        like : Layout
            The difference's.
        sender : str
            Whom an error names.
        into : mapping of str to array, optional
            C-contiguous arrays to write to and return; what they hold after an error is undefined.

        Raises
        ------
        WireError
            Naming `sender` and the fault, if `coded` is nothing that `encode` makes of such arrays.
        """

    def layout(self, like: Layout) -> Layout:
        """Return the layout of the coded arrays of a difference with the layout `like`."""


class Whole:
    """Sends every number as it is."""

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
        return filled({t.name: coded[t.name] for t in like.tensors}, room(like) if into is None else into)

    def layout(self, like: Layout) -> Layout:
        """Return the same names and shapes in float32."""
        return _retyped(like, "float32")


class Float16:
    """IEEE half precision, rounded to nearest: half the bytes.

    A number beyond ±65504 becomes ±65504 instead of an infinity: a difference that large is rare, and
    a clipped coordinate costs less than a client's whole round. Numbers below 3e-8 become zero; `bf16`
    keeps them.
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
        halves = room(self.layout(Layout.of(arrays))) if into is None else into
        return {name: to_half(a, halves[name], clip=True) for name, a in arrays.items()}

    def decode(
        self, coded: Arrays, like: Layout, sender: str, into: Arrays | None = None
    ) -> dict[str, np.ndarray]:
        """Widen; exact."""
        check_coded(coded, self.layout(like), sender)
        wide = room(like) if into is None else into
        return {t.name: from_half(coded[t.name], wide[t.name]) for t in like.tensors}

    def layout(self, like: Layout) -> Layout:
        """Return the same names and shapes in float16."""
        return _retyped(like, "float16")


class BFloat16:
    """The upper half of a float32, rounded to nearest with ties to even: its range, 8 significant bits.

    The few numbers that would round to infinity become the largest finite one, as in :class:`Float16`.
    """

    name: ClassVar[str] = "bf16"
    unbiased: ClassVar[bool] = False
    by_tensor: ClassVar[bool] = True
    bounded: ClassVar[bool] = False

    def encode(
        self, arrays: Arrays, rng: np.random.Generator, into: Arrays | None = None
    ) -> dict[str, np.ndarray]:
        """Return the 16 bits of each number as uint16, as a payload stores bfloat16."""
        check_numbers(arrays)
        return filled({name: _to_bfloat16(a) for name, a in arrays.items()}, into)

    def decode(
        self, coded: Arrays, like: Layout, sender: str, into: Arrays | None = None
    ) -> dict[str, np.ndarray]:
        """Widen; exact."""
        check_coded(coded, self.layout(like), sender)
        wide = room(like) if into is None else into
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
    """Refuse an update that no receiver would take, before it is rounded into one that looks sound.

    Raises
    ------
    CodecError
        If a number is not finite.
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
    """Refuse coded arrays that do not have a layout's names, dtypes, shapes and finite numbers.

    Raises
    ------
    WireError
        Naming `sender` and the first fault.
    """
    expected = {t.name: t for t in layout.tensors}
    if set(coded) != set(expected):
        odd = sorted(set(coded) ^ set(expected))[0]
        raise WireError(sender, f"coded array {odd!r} is {'missing' if odd in expected else 'superfluous'}")
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


def room(like: Layout) -> dict[str, np.ndarray]:
    """Return arrays of a layout to be filled, in one block: a tensor's pages each cost more than its numbers do."""
    return Weights.empty(like).views()


def filled(arrays: Arrays, into: Arrays | None) -> dict[str, np.ndarray]:
    """Return arrays, copied to others where those are given."""
    if into is None:
        return dict(arrays)
    for name, array in arrays.items():
        np.copyto(into[name], array)
    return {name: into[name] for name in arrays}


def flatten(arrays: Arrays) -> np.ndarray:
    """Return all numbers of an update as one new float32 vector, after :func:`check_numbers`."""
    check_numbers(arrays)
    parts = [a.reshape(-1) for a in arrays.values()]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def unflatten(flat: np.ndarray, like: Layout) -> dict[str, np.ndarray]:
    """Return a vector's tensors as views."""
    arrays, start = {}, 0
    for tensor in like.tensors:
        arrays[tensor.name] = flat[start : start + tensor.size].reshape(tensor.shape)
        start += tensor.size
    return arrays


def numbers(like: Layout) -> int:
    """Return d, the numbers of an update."""
    return sum(t.size for t in like.tensors)


def _retyped(like: Layout, dtype: str) -> Layout:
    return Layout(tuple(TensorSpec(t.name, dtype, t.shape) for t in like.tensors))


def _to_bfloat16(array: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
    # Adding just under half of the lower 16 bits' range, and one more where the result is odd,
    # carries into the upper half exactly when the nearest, or on a tie the even, neighbour is above.
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    half = (rounded >> np.uint32(16)).astype(np.uint16).reshape(array.shape)
    overflow = (half & _BF16_EXPONENT) == _BF16_EXPONENT
    return np.where(overflow, (half & np.uint16(0x8000)) | _BF16_LARGEST, half)
