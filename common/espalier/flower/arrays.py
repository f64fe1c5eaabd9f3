"""Turns numpy buffers into Flower Arrays and back without needless copies of a whole model."""

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
        Any shape; not of an object dtype. What is not C-contiguous is made so first.

    Returns
    -------
    Array
        As ``Array(ndarray)`` builds it (an ``.npy`` header and the buffer), byte for byte for C-contiguous
        input.

    Raises
    ------
    ValueError
        If the dtype holds Python objects, which only pickle could carry.
    """
    packed = np.asarray(ndarray, order="C")
    array, room = blank_array(packed.dtype, packed.shape)
    np.copyto(room, packed, casting="no")
    return array


def blank_array(dtype: npt.DTypeLike, shape: Sequence[int]) -> tuple[Array, npt.NDArray[Any]]:
    """Build a Flower Array of zeros and, in its own bytes, the numpy array to write its numbers to.

    What is written there must be written before anybody reads the Array, as it is hashed then.

    Returns
    -------
    Array
        As ``Array(np.zeros(shape, dtype))`` builds it.
    np.ndarray
        C-contiguous, of that shape; whoever is done writing makes it read-only.

    Raises
    ------
    ValueError
        If the dtype holds Python objects, which only pickle could carry.
    """
    kind, size = np.dtype(dtype), tuple(int(n) for n in shape)
    head = _header(kind, size)
    data, room = blank_bytes(len(head) + math.prod(size) * kind.itemsize)
    room[: len(head)] = np.frombuffer(head, np.uint8)
    numbers = room[len(head) :].view(kind).reshape(size)
    return Array(dtype=str(kind), shape=size, stype=SType.NUMPY, data=data), numbers


def npy_size(dtype: npt.DTypeLike, shape: Sequence[int]) -> int:
    """Return the bytes of the Array that `blank_array` builds; raises like it, and TypeError where that is no dtype."""
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
    """Return new bytes of zeros, and their memory, to be written to while nobody else knows of them.

    So what is put together of pieces lies in memory once, where a copy of a bytearray would be a second one.

    Raises
    ------
    ValueError
        If they are fewer than two: Python has one object for all bytes of such a value.
    """
    if size < 2:
        raise ValueError(f"{size} bytes are nobody's alone")
    data = bytes(size)
    block = (ctypes.c_uint8 * size).from_address(np.frombuffer(data, np.uint8).ctypes.data)
    block.owner = data  # type: ignore[attr-defined]  # what lives on them keeps them alive
    memory = np.frombuffer(memoryview(block), np.uint8)
    in_huge_pages(memory)
    return data, memory


def numpy_view(array: Array) -> npt.NDArray[Any]:
    """Return a read-only numpy view of an Array's bytes, without copying them.

    Parameters
    ----------
    array : Array
        A Flower Array serialised as ``.npy``.

    Returns
    -------
    np.ndarray
        Read-only; it keeps ``array.data`` alive.

    Raises
    ------
    ValueError
        If the bytes are no ``.npy`` array, hold Python objects, are cut short or too long, or are not of the
        dtype and shape that the Array claims.
    """
    if array.stype != SType.NUMPY:
        raise ValueError(f"serialisation {array.stype!r} is not supported, only {SType.NUMPY!r}")
    stream = BytesIO(array.data)  # shares the bytes
    shape, fortran, dtype = _read_header(stream)
    if dtype.hasobject:
        raise ValueError(f"an array of dtype {dtype} is refused: it holds Python objects")
    if str(dtype) != array.dtype or tuple(shape) != tuple(array.shape):
        raise ValueError(
            f"header says {dtype}{list(shape)}, the Array claims {array.dtype}{list(array.shape)}"
        )
    count = math.prod(shape)
    offset = stream.tell()
    if len(array.data) - offset != count * dtype.itemsize:
        raise ValueError(f"{len(array.data) - offset} bytes of data, expected {count * dtype.itemsize}")
    flat = np.frombuffer(array.data, dtype=dtype, count=count, offset=offset)
    return flat.reshape(shape, order="F" if fortran else "C")


def _read_header(stream: BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read what an ``.npy`` header says; raises ValueError whatever is wrong with it."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy version {version} is not supported")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(stream)
    # numpy parses the header as a Python literal, and lets through most of what a parser raises.
    except (
        tokenize.TokenError,
        SyntaxError,
        TypeError,
        LookupError,
        ArithmeticError,
        RecursionError,
        MemoryError,
    ) as error:
        raise ValueError(f"its header is none ({type(error).__name__})") from error
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"its header says the shape {shape}")
    return shape, fortran, dtype


def payload_bytes(content: RecordDict) -> int:
    """Count the payload bytes of a message as sent, in bytes.

    Parameters
    ----------
    content : RecordDict
        The content of a message.

    Returns
    -------
    int
        Bytes of every Array's data plus the serialised ConfigRecords and MetricRecords; Flower's own framing
        (message and object headers, some hundred bytes) is not counted.
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
