"""One section of tensors on a link: a flat buffer per dtype and the layout that says what lies where."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from flwr.app import ArrayRecord

from espalier.errors import WireError
from espalier.flower.arrays import array_from_numpy, blank_array, numpy_view
from espalier.wire.half import is_finite
from espalier_proto import espalier_pb2 as pb

#: Dtypes a payload may hold. "bfloat16" has no numpy type and is stored as its 16 bits.
STORED_AS: dict[str, np.dtype[np.generic]] = {
    name: np.dtype(name)
    for name in (
        "float64",
        "float32",
        "float16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "uint16",
        "uint32",
        "bool",
    )
} | {"bfloat16": np.dtype("uint16")}

#: Limits of what a message may announce: they bound what a receiver spends on it.
MAX_TENSORS = 20_000
MAX_ELEMENTS = 4_000_000_000
MAX_DIMENSIONS = 32
#: Largest value that is accepted: no model's is near it, and a float32 still holds it times any number of samples.
LARGEST = 2.0**60


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one tensor of a payload."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The tensors of a payload in order; each dtype's tensors lie in its buffer without gaps."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Layout:
        """Describe named arrays in their order."""
        return cls(tuple(TensorSpec(name, str(a.dtype), tuple(a.shape)) for name, a in arrays.items()))

    @classmethod
    def from_proto(cls, specs: Iterable[pb.TensorSpec], sender: str) -> Layout:
        """Read and validate the tensor list of a message.

        Raises
        ------
        WireError
            If a dtype is unknown, a name is empty or repeated, or the list or a tensor is absurdly large.
        """
        found = list(specs)
        if len(found) > MAX_TENSORS:
            raise WireError(sender, f"a layout of {len(found)} tensors, more than {MAX_TENSORS}")
        for spec in found:
            # Before anything is multiplied: the product of a million large numbers takes minutes.
            if len(spec.shape) > MAX_DIMENSIONS:
                raise WireError(sender, f"tensor {spec.name[:100]!r} has {len(spec.shape)} dimensions")
            # A 0 among them makes no room for numbers that numpy refuses.
            if math.prod(n for n in spec.shape if n) > MAX_ELEMENTS:
                raise WireError(sender, f"tensor {spec.name[:100]!r} has more than {MAX_ELEMENTS} elements")
        tensors = tuple(TensorSpec(s.name, s.dtype, tuple(s.shape)) for s in found)
        names = {t.name for t in tensors}
        if len(names) != len(tensors) or "" in names:
            raise WireError(sender, "a layout with an empty or repeated tensor name")
        for tensor in tensors:
            if tensor.dtype not in STORED_AS:
                raise WireError(sender, f"tensor {tensor.name!r} has the unknown dtype {tensor.dtype!r}")
        if sum(t.size for t in tensors) > MAX_ELEMENTS:
            raise WireError(sender, f"a layout of more than {MAX_ELEMENTS} elements")
        return cls(tensors)

    def to_proto(self) -> pb.Layout:
        """Return the protobuf form."""
        return pb.Layout(
            tensors=[pb.TensorSpec(name=t.name, dtype=t.dtype, shape=t.shape) for t in self.tensors]
        )

    @cached_property
    def lengths(self) -> dict[str, int]:
        """Elements per dtype, in order of first appearance."""
        lengths: dict[str, int] = {}
        for tensor in self.tensors:
            lengths[tensor.dtype] = lengths.get(tensor.dtype, 0) + tensor.size
        return lengths

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names in order."""
        return tuple(t.name for t in self.tensors)

    @cached_property
    def _by_name(self) -> dict[str, TensorSpec]:
        return {t.name: t for t in self.tensors}

    def get(self, name: str) -> TensorSpec | None:
        """Return a tensor's description; None where there is no such tensor."""
        return self._by_name.get(name)

    def only(self, names: Iterable[str]) -> Layout:
        """Return the layout of some of the tensors, in this layout's order.

        Raises
        ------
        ValueError
            If a name is none of them.
        """
        wanted = set(names)
        if strange := wanted.difference(self.names):
            raise ValueError(f"tensor {min(strange)!r} is none of the payload's")
        return Layout(tuple(t for t in self.tensors if t.name in wanted))

    def in_order(self, other: Layout) -> Layout:
        """Return another layout with its tensors in this one's order, unknown ones last."""
        place = {name: i for i, name in enumerate(self.names)}
        return Layout(tuple(sorted(other.tensors, key=lambda t: place.get(t.name, len(place)))))

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(n * STORED_AS[dtype].itemsize for dtype, n in self.lengths.items())

    def difference(self, other: Layout) -> str:
        """Say in a few words how `other` departs from this layout ("" where it does not)."""
        mine = {t.name: t for t in self.tensors}
        theirs = {t.name: t for t in other.tensors}
        if missing := [name for name in mine if name not in theirs]:
            return f"tensor {missing[0]!r} is missing ({len(missing)} in all)"
        if extra := [name for name in theirs if name not in mine]:
            return f"tensor {extra[0]!r} was not asked for ({len(extra)} in all)"
        for name, tensor in mine.items():
            if theirs[name] != tensor:
                return (
                    f"tensor {name!r} is {theirs[name].dtype}{list(theirs[name].shape)}, "
                    f"expected {tensor.dtype}{list(tensor.shape)}"
                )
        return "" if mine == theirs and self.names == other.names else "the tensors are in another order"


@dataclass(frozen=True)
class Weights:
    """Named tensors as flat buffers: one section of a payload.

    Attributes
    ----------
    layout : Layout
        What lies where.
    buffers : dict[str, np.ndarray]
        One 1-D array per dtype of the layout, of exactly its length.
    record : ArrayRecord or None
        What the buffers are views of, so that they can be sent on without a copy; read-only ones, once filled.
    link : Weights or None
        The same numbers in the narrower form in which they were received, to be sent on in that form; only where the
        reader asked for it.
    """

    layout: Layout
    buffers: dict[str, np.ndarray]
    record: ArrayRecord | None = field(default=None, compare=False, repr=False)
    link: Weights | None = field(default=None, compare=False, repr=False)

    @classmethod
    def pack(cls, arrays: Mapping[str, np.ndarray]) -> Weights:
        """Copy named arrays into new flat buffers."""
        return cls.fill(Layout.of(arrays), arrays)

    @classmethod
    def empty(cls, layout: Layout) -> Weights:
        """Return buffers of a layout, to be filled."""
        return cls(layout, {d: np.empty(n, STORED_AS[d]) for d, n in layout.lengths.items()})

    @classmethod
    def blank(cls, layout: Layout) -> Weights:
        """Return zeros that lie in what will be sent, to be filled before :meth:`frozen`: no copy is made of them."""
        made = {dtype: blank_array(STORED_AS[dtype], (n,)) for dtype, n in layout.lengths.items()}
        record = ArrayRecord({dtype: array for dtype, (array, _) in made.items()})
        return cls(layout, {dtype: numbers for dtype, (_, numbers) in made.items()}, record)

    @classmethod
    def fill(cls, layout: Layout, arrays: Mapping[str, np.ndarray]) -> Weights:
        """Copy arrays into new buffers of a given layout (bfloat16 tensors come as their uint16 bits)."""
        weights = cls.empty(layout)
        for name, view in weights.views().items():
            np.copyto(view, arrays[name], casting="no")
        return weights

    def views(self) -> dict[str, np.ndarray]:
        """Return every tensor as a view of its buffer, in layout order."""
        offsets = dict.fromkeys(self.buffers, 0)
        views = {}
        for tensor in self.layout.tensors:
            start = offsets[tensor.dtype]
            offsets[tensor.dtype] = start + tensor.size
            views[tensor.name] = self.buffers[tensor.dtype][start : start + tensor.size].reshape(tensor.shape)
        return views

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(b.nbytes for b in self.buffers.values())

    def to_record(self) -> ArrayRecord:
        """Return an ArrayRecord with one flat Array per dtype; it is not to be changed."""
        if self.record is not None:
            return self.record
        return ArrayRecord({dtype: array_from_numpy(buffer) for dtype, buffer in self.buffers.items()})

    def frozen(self) -> Weights:
        """Return the same numbers as read-only views of what is sent, so that they lie in memory once."""
        if self.record is not None:
            for buffer in self.buffers.values():
                buffer.flags.writeable = False
            return self
        record = self.to_record()
        return Weights(self.layout, {dtype: numpy_view(record[dtype]) for dtype in self.buffers}, record)

    @classmethod
    def from_record(cls, record: ArrayRecord, layout: Layout, sender: str) -> Weights:
        """Read the flat Arrays of a message; the buffers are read-only views of the received bytes.

        Parameters
        ----------
        record : ArrayRecord
            One flat Array per dtype of the layout.
        layout : Layout
            What the receiver expects.
        sender : str
            Whom an error names.

        Raises
        ------
        WireError
            If a buffer is missing, superfluous, of another dtype, shape or length, or holds what cannot be
            added up.
        """
        buffers = read_buffers(record, layout.lengths, sender)
        weights = cls(layout, buffers, record)
        if fault := weights.not_finite():
            raise WireError(sender, fault)
        return weights

    def not_finite(self) -> str:
        """Name the first tensor with a number that cannot be added up ("" where all can): see `fault_of`."""
        for dtype, buffer in self.buffers.items():
            if buffer.dtype.kind == "f" and fault_of(buffer):
                for name, view in self.views().items():
                    if view.dtype == STORED_AS[dtype] and (fault := fault_of(view)):
                        return f"tensor {name!r} holds {fault}"
        return ""


def read_buffers(record: ArrayRecord, lengths: Mapping[str, int], sender: str) -> dict[str, np.ndarray]:
    """Return the flat Arrays of a record by dtype, as read-only views.

    Parameters
    ----------
    record : ArrayRecord
        What came.
    lengths : mapping of str to int
        The expected elements per dtype.
    sender : str
        Whom an error names.

    Raises
    ------
    WireError
        If a buffer is missing, superfluous, or of another dtype, shape or length.
    """
    if set(record) != set(lengths):
        raise WireError(
            sender,
            f"buffers {sorted(record)[:20]}, expected {sorted(lengths)}: a tensor is missing or too many",
        )
    buffers = {}
    for dtype, length in lengths.items():
        try:
            buffer = numpy_view(record[dtype])
        except ValueError as error:
            raise WireError(sender, f"the {dtype} buffer cannot be read ({error})") from error
        if buffer.dtype != STORED_AS[dtype]:
            raise WireError(sender, f"the {dtype} buffer holds {buffer.dtype}")
        if buffer.shape != (length,):
            raise WireError(sender, f"the {dtype} buffer has shape {buffer.shape}, expected ({length},)")
        buffers[dtype] = buffer
    return buffers


def fault_of(array: np.ndarray) -> str:
    """Say what keeps floats from being added up: a NaN, an infinity, or a value beyond ±`LARGEST` ("": nothing).

    A number of 3e38 is finite, and twice that is not: whoever sends one would spoil the sum that all share.
    """
    flat = array.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        if flat.dtype.itemsize >= 4:
            # No value is larger than the norm: one quick pass, without a mask as large as the model, clears all.
            if np.dot(flat, flat) < LARGEST**2:
                return ""
        elif is_finite(flat):  # float16 holds nothing too large
            return ""
        if not np.isfinite(flat).all():
            return "a value that is not finite"
        return "a value too large to be added up" if (np.abs(flat) > LARGEST).any() else ""
