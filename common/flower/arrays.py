"""Turns numpy buffers into Flower Arrays and back without needless copies of a whole model."""

from __future__ import annotations

import math
import tokenize
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.constant import SType
from flwr.common.serde import config_record_to_proto, metric_record_to_proto


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
    if ndarray.dtype.hasobject:
        raise ValueError(f"an array of dtype {ndarray.dtype} cannot be sent: it holds Python objects")
    packed = np.asarray(ndarray, order="C")
    head = BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(packed))
    body = packed.reshape(-1).view(np.uint8).data if packed.size else b""
    return Array(
        dtype=str(packed.dtype),
        shape=tuple(int(n) for n in packed.shape),
        stype=SType.NUMPY,
        data=b"".join((head.getvalue(), body)),
    )


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
