"""Conversion between NumPy arrays and Flower Arrays with a single copy or none."""

from __future__ import annotations

import ctypes
import math
import tokenize
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.constant import SType
from flwr.common.serde import config_record_to_proto, metric_record_to_proto

from espalier.flower.memory import in_huge_pages


def array_from_numpy(ndarray: npt.NDArray[Any]) -> Array:
    """Build a Flower Array from a numpy array with a single copy of its buffer.

    Parameters
    ----------
    ndarray : np.ndarray
        Of any shape and of any dtype but object; copied first if it is not C-contiguous.

    Returns
    -------
    Array
        The bytes of ``Array(ndarray)``: an ``.npy`` header and the buffer.

    Raises
    ------
    ValueError
        If the dtype holds Python objects, which would need pickle.
    """
    packed = np.asarray(ndarray, order="C")
    array, numbers = blank_array(packed.dtype, packed.shape)
    np.copyto(numbers, packed, casting="no")
    return array


def blank_array(dtype: npt.DTypeLike, shape: Sequence[int]) -> tuple[Array, npt.NDArray[Any]]:
    """Build a Flower Array of zeros and a writable NumPy view of its data.

    All values must be written before the Array is used, as its object id is a hash of its bytes.

    Returns
    -------
    Array
        Equal to ``Array(np.zeros(shape, dtype))``.
    np.ndarray
        C-contiguous, of that shape; the caller makes it read-only when it has been written.

    Raises
    ------
    ValueError
        If the dtype holds Python objects, which would need pickle.
    """
    kind, size = np.dtype(dtype), tuple(int(n) for n in shape)
    head = _header(kind, size)
    data, memory = blank_bytes(len(head) + math.prod(size) * kind.itemsize)
    memory[: len(head)] = np.frombuffer(head, np.uint8)
    numbers = memory[len(head) :].view(kind).reshape(size)
    return Array(dtype=str(kind), shape=size, stype=SType.NUMPY, data=data), numbers


def npy_size(dtype: npt.DTypeLike, shape: Sequence[int]) -> int:
    """Return the size in bytes of the Array that `blank_array` builds; raises TypeError for an unknown dtype."""
    kind = np.dtype(dtype)
    return len(_header(kind, tuple(shape))) + math.prod(shape) * kind.itemsize


def _header(kind: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the ``.npy`` header of a C-contiguous array."""
    if kind.hasobject:
        raise ValueError(f"an array of dtype {kind} cannot be sent: it holds Python objects")
    head = BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, facts)
    return head.getvalue()


def blank_bytes(size: int) -> tuple[bytes, npt.NDArray[np.uint8]]:
    """Return a new `bytes` object of zeros and a writable view of it, which must be written before it is shared.

    Data assembled from pieces is then in memory once; a bytearray would have to be copied to bytes.

    Raises
    ------
    ValueError
        If `size` is below 2: CPython shares all such bytes objects.
    """
    if size < 2:
        raise ValueError(f"cannot allocate {size} bytes: CPython shares bytes objects of fewer than 2")
    data = bytes(size)
    block = (ctypes.c_uint8 * size).from_address(np.frombuffer(data, np.uint8).ctypes.data)
    block.owner = data  # type: ignore[attr-defined]  # a view of the block keeps the bytes alive
    memory = np.frombuffer(memoryview(block), np.uint8)
    in_huge_pages(memory)
    return data, memory


def numpy_view(array: Array) -> npt.NDArray[Any]:
    """Return a read-only NumPy view of an Array's bytes, without a copy.

    Parameters
    ----------
    array : Array
        A Flower Array serialised as ``.npy``.

    Returns
    -------
    np.ndarray
        Read-only; keeps ``array.data`` alive.

    Raises
    ------
    ValueError
        If the bytes are not an ``.npy`` array, hold Python objects, are truncated or too long, or differ from the
        dtype and shape of the Array.
    """
    if array.stype != SType.NUMPY:
        raise ValueError(f"serialisation {array.stype!r} is not supported, only {SType.NUMPY!r}")
    stream = BytesIO(array.data)  # shares the bytes
    shape, fortran, dtype = _read_header(stream)
    if dtype.hasobject:
        raise ValueError(f"an array of dtype {dtype} is refused: it holds Python objects")
    if str(dtype) != array.dtype or tuple(shape) != tuple(array.shape):
        raise ValueError(f"the header has {dtype}{list(shape)}, the Array {array.dtype}{list(array.shape)}")
    count = math.prod(shape)
    offset = stream.tell()
    if len(array.data) - offset != count * dtype.itemsize:
        raise ValueError(f"{len(array.data) - offset} bytes of data, expected {count * dtype.itemsize}")
    flat = np.frombuffer(array.data, dtype=dtype, count=count, offset=offset)
    return flat.reshape(shape, order="F" if fortran else "C")


def _read_header(stream: BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Parse an ``.npy`` header; raises ValueError for any defect."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy version {version} is not supported")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(stream)
    # NumPy parses the header as a Python literal, and does not catch most exceptions of the parser.
    except (
        tokenize.TokenError,
        SyntaxError,
        TypeError,
        LookupError,
        ArithmeticError,
        RecursionError,
        MemoryError,
    ) as error:
        raise ValueError(f"malformed header ({type(error).__name__})") from error
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"malformed shape {shape} in the header")
    return shape, fortran, dtype


def payload_bytes(content: RecordDict) -> int:
    """Return the payload size of a message as sent, in bytes.

    Parameters
    ----------
    content : RecordDict
        The content of a message.

    Returns
    -------
    int
        Size of the data of all Arrays plus the serialised ConfigRecords and MetricRecords, without Flower's framing
        (message and object headers, some hundred bytes).
    """
    total = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            total += sum(len(array.data) for array in record.values())
        elif isinstance(record, MetricRecord):
            total += metric_record_to_proto(record).ByteSize()
        elif isinstance(record, ConfigRecord):
            total += config_record_to_proto(record).ByteSize()
    return total
