"""Lossy codecs of whole updates: stochastic quantisation (QSGD) and sparsification (top-k)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from espalier.config.fields import Int, SettingsGroup
from espalier.errors import WireError
from espalier.wire.bitpack import MAX_WIDTH, code_dtype, pack, packed_size, unpack
from espalier.wire.codec import Arrays, CodecError, check_coded, filled, flatten, numbers, unflatten
from espalier.wire.payload import Layout, TensorSpec

MAX_LEVELS = 2 ** (MAX_WIDTH - 1) - 1
"""Maximum number of levels of :class:`QSGD`: with the sign bit they take `MAX_WIDTH` bits."""

#: Elements quantised at a time; it bounds the memory of the temporary double-precision arrays.
_CHUNK = 1 << 16


class QSGD:
    """Stochastic quantisation to s levels of the 2-norm (FedPAQ, arXiv 1909.13014, §3.2; QSGD, 1610.02132).

    ``Q(x)_i = ‖x‖ · sign(x_i) · ξ_i``, where ``s·ξ_i`` is ``a = s·|x_i|/‖x‖`` rounded up with probability
    ``a − ⌊a⌋`` and down otherwise. So ``E Q(x) = x`` and ``E‖Q(x) − x‖² ≤ min(d/s², √d/s)·‖x‖²``. An element takes
    1 + ⌈log2(s+1)⌉ bits, a norm 32.

    Parameters
    ----------
    levels : int
        s, 1 (ternary) to `MAX_LEVELS`.
    per_tensor : bool
        Whether each tensor is scaled by its own norm, which reduces the variance; in the paper the norm is that of the
        whole difference.
    """

    class Settings(SettingsGroup):
        """The number of levels and the norm."""

        codec_levels: Int = Field(
            default=7, ge=1, le=2**23 - 1, description="number of levels s; 7 levels take 4 bits per number"
        )
        codec_norm: Literal["whole", "tensor"] = Field(
            default="whole", description="one norm for the whole difference, or one per tensor"
        )

    name: ClassVar[str] = "qsgd"
    unbiased: ClassVar[bool] = True
    by_tensor: ClassVar[bool] = False
    bounded: ClassVar[bool] = False

    #: Names of the coded arrays.
    CODES, NORMS = "qsgd/codes", "qsgd/norms"

    def __init__(self, levels: int, *, per_tensor: bool = False) -> None:
        if not 1 <= levels <= MAX_LEVELS:
            raise ValueError(f"{levels} levels; 1 to {MAX_LEVELS} can be coded")
        self.levels, self.per_tensor = levels, per_tensor
        #: Bits per element: s.bit_length() is ceil(log2(s + 1)) without rounding errors.
        self.width = 1 + levels.bit_length()

    def encode(
        self, arrays: Arrays, rng: np.random.Generator, into: Arrays | None = None
    ) -> dict[str, np.ndarray]:
        """Return the packed codes (the sign bit, then the level) and the float32 norms.

        Raises
        ------
        CodecError
            If a value is not finite, or a norm exceeds the range of float32.
        """
        flat = flatten(arrays)
        blocks = self._blocks(Layout.of(arrays))
        norms = np.empty(len(blocks), np.float32)
        codes = np.empty(len(flat), code_dtype(self.width))
        for i, (start, stop) in enumerate(blocks):
            norms[i] = norm = _norm(flat[start:stop])
            if not np.isfinite(norm):
                raise CodecError(
                    f"the update's norm is more than a float32 holds (codec={self.name}); lower learning-rate"
                )
            for at in range(start, stop, _CHUNK):
                part = slice(at, min(at + _CHUNK, stop))
                codes[part] = self._quantise(flat[part], norm, rng)
        return filled({self.CODES: pack(codes, self.width), self.NORMS: norms}, into)

    def decode(
        self, coded: Arrays, like: Layout, sender: str, into: Arrays | None = None
    ) -> dict[str, np.ndarray]:
        """Return norm · sign · level / s for every element."""
        check_coded(coded, self.layout(like), sender)
        norms = coded[self.NORMS]
        if (norms < 0).any():
            raise WireError(sender, "a norm of the update is negative")
        try:
            codes = unpack(coded[self.CODES], numbers(like), self.width)
        except ValueError as error:
            raise WireError(sender, f"the codes of the update do not fit: {error}") from error
        flat = np.empty(len(codes), np.float32)
        mask = codes.dtype.type((1 << self.width - 1) - 1)
        for norm, (start, stop) in zip(norms, self._blocks(like), strict=True):
            for at in range(start, stop, _CHUNK):
                part = slice(at, min(at + _CHUNK, stop))
                levels = codes[part] & mask
                if (top := int(levels.max())) > self.levels:
                    raise WireError(sender, f"a code has level {top}, above codec-levels={self.levels}")
                size = np.float64(norm) * levels / self.levels
                flat[part] = np.where(codes[part] > mask, -size, size)
        return filled(unflatten(flat, like), into)

    def layout(self, like: Layout) -> Layout:
        """Return the layout of the packed codes and the norms."""
        return Layout(
            (
                TensorSpec(self.CODES, "uint8", (packed_size(numbers(like), self.width),)),
                TensorSpec(self.NORMS, "float32", (len(self._blocks(like)),)),
            )
        )

    def _blocks(self, like: Layout) -> list[tuple[int, int]]:
        """Return the ranges of the flat update that are scaled by one norm each."""
        if not self.per_tensor:
            return [(0, numbers(like))]
        ends = np.cumsum([t.size for t in like.tensors], dtype=np.int64)
        return [(int(end) - t.size, int(end)) for t, end in zip(like.tensors, ends, strict=True)]

    def _quantise(self, values: np.ndarray, norm: np.float32, rng: np.random.Generator) -> np.ndarray:
        """Round stochastically to codes; `rng` advances by the same amount if the norm is 0."""
        draws = rng.random(len(values))
        if norm == 0:
            return np.zeros(len(values), code_dtype(self.width))
        # Multiply before dividing: |x|·s is exact in double precision, so a value that equals a level is not rounded,
        # and no level exceeds s.
        scaled = np.abs(values, dtype=np.float64) * self.levels / np.float64(norm)
        lower = np.floor(scaled)
        levels = (lower + (draws < scaled - lower)).astype(np.uint32)
        sign = ((values < 0) & (levels > 0)).astype(np.uint32)
        codes: np.ndarray = (sign << np.uint32(self.width - 1)) | levels
        return codes


class TopK:
    """Sparsification to the largest absolute values of the whole difference (Aji and Heafield 2017, arXiv 1704.05021).

    Biased: the other elements become zero, and their error is not accumulated. Among equal absolute values the first
    are selected. Positions are sent as a bit mask or as ascending uint32 indices, whichever is smaller: the mask from
    a share of 1/32 on.

    Parameters
    ----------
    keep : float
        Share of the elements that are sent, in (0, 1]; at least one is.
    """

    class Settings(SettingsGroup):
        """The share of elements that are sent."""

        codec_keep: float = Field(default=0.05, gt=0, le=1, description="share of the numbers that are sent")

    name: ClassVar[str] = "top-k"
    unbiased: ClassVar[bool] = False
    by_tensor: ClassVar[bool] = False
    bounded: ClassVar[bool] = False

    #: Names of the coded arrays: the values, and either the indices or the mask.
    VALUES, INDICES, MASK = "top-k/values", "top-k/indices", "top-k/mask"

    def __init__(self, keep: float) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"a share of {keep}; a number in (0, 1] is expected")
        self.keep = keep

    def selected(self, size: int) -> int:
        """Return how many of `size` elements are sent: the rounded share, at least one."""
        return min(size, max(1, math.floor(self.keep * size + 0.5)))

    def encode(
        self, arrays: Arrays, rng: np.random.Generator, into: Arrays | None = None
    ) -> dict[str, np.ndarray]:
        """Return the values of largest magnitude in the order of their positions, and the positions."""
        flat = flatten(arrays)
        count = self.selected(len(flat))
        chosen = _largest(np.abs(flat), count)
        values = flat[chosen]
        if self._masked(len(flat)):
            return filled({self.VALUES: values, self.MASK: np.packbits(chosen)}, into)
        return filled({self.VALUES: values, self.INDICES: np.flatnonzero(chosen).astype(np.uint32)}, into)

    def decode(
        self, coded: Arrays, like: Layout, sender: str, into: Arrays | None = None
    ) -> dict[str, np.ndarray]:
        """Return the values at their positions, and zeros elsewhere."""
        check_coded(coded, self.layout(like), sender)
        size = numbers(like)
        flat = np.zeros(size, np.float32)
        if self._masked(size):
            bits = np.unpackbits(coded[self.MASK])
            if bits[size:].any():
                raise WireError(sender, "the mask of the update has bits after the last number")
            chosen = bits[:size].view(np.bool_)
            if (count := int(np.count_nonzero(chosen))) != len(coded[self.VALUES]):
                raise WireError(
                    sender, f"the mask marks {count} elements for {len(coded[self.VALUES])} values"
                )
            flat[chosen] = coded[self.VALUES]
        else:
            indices = coded[self.INDICES]
            if (indices[1:] <= indices[:-1]).any():
                raise WireError(sender, "the indices of the update are not rising, or one is repeated")
            if len(indices) and int(indices[-1]) >= size:
                raise WireError(
                    sender, f"index {int(indices[-1])} is out of range, the update has {size} numbers"
                )
            flat[indices] = coded[self.VALUES]
        return filled(unflatten(flat, like), into)

    def layout(self, like: Layout) -> Layout:
        """Return the layout of the values and their positions."""
        size = numbers(like)
        count = self.selected(size)
        positions = (
            TensorSpec(self.MASK, "uint8", (packed_size(size, 1),))
            if self._masked(size)
            else TensorSpec(self.INDICES, "uint32", (count,))
        )
        return Layout((TensorSpec(self.VALUES, "float32", (count,)), positions))

    def _masked(self, size: int) -> bool:
        """Whether the mask of `size` bits takes no more bytes than the indices."""
        return packed_size(size, 1) <= 4 * self.selected(size)


def _norm(values: np.ndarray) -> np.float32:
    """Return the 2-norm, summed in double precision so that it is not below the largest |value|."""
    squares = sum(
        float(np.sum(np.square(values[at : at + _CHUNK], dtype=np.float64)))
        for at in range(0, len(values), _CHUNK)
    )
    with np.errstate(over="ignore"):
        return np.float32(math.sqrt(squares))


def _largest(sizes: np.ndarray, count: int) -> np.ndarray:
    """Return the mask of the `count` largest of `sizes`; among equal ones the first."""
    if count == len(sizes):
        return np.ones(len(sizes), np.bool_)
    threshold = np.partition(sizes, len(sizes) - count)[len(sizes) - count]
    chosen: np.ndarray = sizes > threshold
    ties = np.flatnonzero(sizes == threshold)
    chosen[ties[: count - np.count_nonzero(chosen)]] = True
    return chosen
