"""One section of tensors in a message: a flat buffer per dtype, and the layout of the tensors in the buffers."""

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

#: Limits on the size that a message may declare; they bound the memory and time that a receiver spends on it.
MAX_TENSORS = 20_000
MAX_ELEMENTS = 4_000_000_000
MAX_DIMENSIONS = 32
#: Largest absolute value that is accepted: far above the values of any model, and small enough that its product with
#: any number of samples fits into a float32.
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
    """The tensors of a payload in order; the tensors of one dtype are contiguous in its buffer."""

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
            If a dtype is unknown, a name is empty or repeated, or the list or a tensor exceeds the limits above.
        """
        found = list(specs)
        if len(found) > MAX_TENSORS:
            raise WireError(sender, f"a layout of {len(found)} tensors, more than {MAX_TENSORS}")
        for spec in found:
            # Checked before the product below: the product of a million large integers takes minutes.
            if len(spec.shape) > MAX_DIMENSIONS:
                raise WireError(sender, f"tensor {spec.name[:100]!r} has {len(spec.shape)} dimensions")
            # Zeros are left out: with one the product is 0, but NumPy still rejects the other, too large dimensions.
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
        """Return a tensor's description, or None if there is no tensor of that name."""
        return self._by_name.get(name)

    def only(self, names: Iterable[str]) -> Layout:
        """Return the layout of some of the tensors, in this layout's order.

        Raises
        ------
        ValueError
            If a name is not in this layout.
        """
        wanted = set(names)
        if unknown := wanted.difference(self.names):
            raise ValueError(f"tensor {min(unknown)!r} is not in the payload")
        return Layout(tuple(t for t in self.tensors if t.name in wanted))

    def in_order(self, other: Layout) -> Layout:
        """Return `other` with its tensors in the order of this layout, unknown tensors last."""
        position = {name: i for i, name in enumerate(self.names)}
        return Layout(tuple(sorted(other.tensors, key=lambda t: position.get(t.name, len(position)))))

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(n * STORED_AS[dtype].itemsize for dtype, n in self.lengths.items())

    def difference(self, other: Layout) -> str:
        """Return a short description of the first difference between `other` and this layout, or ""."""
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
        Names, dtypes and shapes of the tensors.
    buffers : dict[str, np.ndarray]
        One 1-D array per dtype of the layout, with the number of elements that the layout gives.
    record : ArrayRecord or None
        The record whose memory the buffers are views of, if any; it is sent without a copy. Once filled, the views are
        read-only.
    link : Weights or None
        The same values in the encoded form in which they were received, to be forwarded without encoding them again;
        set only if the reader requested it.
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
        """Return uninitialised buffers for a layout."""
        return cls(layout, {d: np.empty(n, STORED_AS[d]) for d, n in layout.lengths.items()})

    @classmethod
    def blank(cls, layout: Layout) -> Weights:
        """Return zeros in the memory of the record to be sent, to avoid a copy; fill them, then call :meth:`frozen`."""
        made = {dtype: blank_array(STORED_AS[dtype], (n,)) for dtype, n in layout.lengths.items()}
        record = ArrayRecord({dtype: array for dtype, (array, _) in made.items()})
        return cls(layout, {dtype: numbers for dtype, (_, numbers) in made.items()}, record)

    @classmethod
    def fill(cls, layout: Layout, arrays: Mapping[str, np.ndarray]) -> Weights:
        """Copy arrays into new buffers of a given layout (bfloat16 tensors are passed as uint16 bits)."""
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
        """Return an ArrayRecord with one flat Array per dtype; do not modify it."""
        if self.record is not None:
            return self.record
        return ArrayRecord({dtype: array_from_numpy(buffer) for dtype, buffer in self.buffers.items()})

    def frozen(self) -> Weights:
        """Return the same values as read-only views of the record to be sent, so that only one copy is in memory."""
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
            The layout that the receiver expects.
        sender : str
            Name of the sender, for error messages.

        Raises
        ------
        WireError
            If a buffer is missing, superfluous, or of another dtype, shape or length, or holds a value that
            `fault_of` rejects.
        """
        buffers = read_buffers(record, layout.lengths, sender)
        weights = cls(layout, buffers, record)
        if fault := weights.not_finite():
            raise WireError(sender, fault)
        return weights

    def not_finite(self) -> str:
        """Return a message that names the first tensor with a value that `fault_of` rejects, or ""."""
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
        The received record.
    lengths : mapping of str to int
        The expected elements per dtype.
    sender : str
        Name of the sender, for error messages.

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
    """Describe why a float array cannot be summed: a NaN, an infinity, or a value beyond ±`LARGEST`; "" if it can.

    A value such as 3e38 is finite, but the sum of two is not: one client could make the aggregate infinite.
    """
    flat = array.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        if flat.dtype.itemsize >= 4:
            # No absolute value exceeds the 2-norm, so this one pass accepts nearly all arrays without a mask of the
            # size of the model.
            if np.dot(flat, flat) < LARGEST**2:
                return ""
        elif is_finite(flat):  # every finite float16 is below LARGEST
            return ""
        if not np.isfinite(flat).all():
            return "a value that is not finite"
        return "a value too large to be added up" if (np.abs(flat) > LARGEST).any() else ""
