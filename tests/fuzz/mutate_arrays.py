"""Seeded mutations of what carries tensors: Flower Arrays, decoded arrays and whole message contents."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from google.protobuf.message import Message as Proto

from tests.fuzz.mutate import REALS, TEXTS, mutate_bytes, mutate_proto


class Bomb:
    """Unpickling this ends the process: whoever does is found out."""

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        import os

        return os._exit, (66,)


def npy(array: np.ndarray, **options: Any) -> bytes:
    """Return an array's .npy file."""
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def header(descr: str, shape: str, body: bytes = b"", version: bytes = b"\x01\x00", more: str = "") -> bytes:
    """Return an .npy file whose header says what it likes."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, {more}}}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + body


def mutate_array(array: Array, rng: Random) -> Array:
    """Return an Array with other bytes, another header or another claim; pickles and giants among them."""
    dtype, shape, stype, data = array.dtype, tuple(array.shape), array.stype, array.data
    action = rng.randrange(9)
    if action == 0:
        return Array(dtype, shape, stype, mutate_bytes(data, rng))
    if action == 1:
        start = data.find(b"\n") + 1
        head = mutate_bytes(data[:start], rng)
        return Array(dtype, shape, stype, head + data[start:])
    if action == 2:
        return Array(
            rng.choice(("object", "float64", "int8", "", "<U99999999", "float32")), shape, stype, data
        )
    if action == 3:
        huge = rng.choice(((2**40,), (2**62, 4), (-1,), (), (0,), (*shape, 1), tuple([1] * 80)))
        return Array(dtype, huge, stype, data)
    if action == 4:
        return Array(dtype, shape, rng.choice(("", "pickle", "torch", "numpy.ndarray ")), data)
    if action == 5:
        held = np.empty(1, object)
        held[0] = Bomb()
        return Array(*rng.choice((("object", (1,)), (dtype, shape))), stype, npy(held, allow_pickle=True))
    if action == 6:
        crafted = rng.choice(
            (
                header("'<f4'", "(1099511627776,)"),
                header("'|O'", "(1,)", pickle.dumps(Bomb())),
                header("'<f4'", "(4611686018427387904, 4)"),
                header("'<f4'", "(-1,)"),
                header("'<V0'", "(1099511627776,)"),
                header("[('a', '<f4'), ('b', '|O')]", "(1,)"),
                header("'<f4'", "(" + "1," * 80 + ")", b"\0" * 4),
                header("'<f4'", "(" * 300 + ")" * 300),
                header("'<f4'", "(2,)", b"\0" * 8, version=b"\x03\x00"),
                header("'<f4'", "(True,)", b"\0" * 4),
            )
        )
        claim = rng.choice(((dtype, shape), ("float32", (2**40,)), ("float32", (2**62, 4))))
        return Array(*claim, stype, crafted)
    return Array(dtype, shape, stype, _other_numbers(array, rng, action))


def _other_numbers(array: Array, rng: Random, action: int) -> bytes:
    try:
        values = np.load(io.BytesIO(array.data)).copy()
    except ValueError:
        return mutate_bytes(array.data, rng)
    if not values.size:
        return npy(np.zeros(1, values.dtype))
    at = rng.randrange(values.size)
    if action == 7 and values.dtype.kind == "f":
        largest = float(np.finfo(values.dtype).max)
        values.flat[at] = rng.choice((np.nan, np.inf, -np.inf, largest, -largest, 1e-45, 12345.0))
    elif action == 7 and values.dtype.kind in "iu":
        info = np.iinfo(values.dtype)
        values.flat[at] = rng.choice((info.min, info.max, 0, rng.randint(int(info.min), int(info.max))))
    else:
        other = rng.choice(
            (
                values[:-1],
                np.concatenate([values, values]),
                values.astype(np.float64),
                values.astype(values.dtype.newbyteorder(">")),
                np.asfortranarray(values.reshape(1, *values.shape).repeat(2, 0)),
                values.astype("U8"),
            )
        )
        return npy(other)
    return npy(values)


def mutate_arrays(arrays: dict[str, np.ndarray], rng: Random) -> dict[str, np.ndarray]:
    """Return decoded arrays of which one is of another type, shape, value or name."""
    changed = dict(arrays)
    name = rng.choice(sorted(changed)) if changed else "w"
    action = rng.randrange(9)
    if action == 0:
        changed.pop(name, None)
        return changed
    if action == 1:
        changed[rng.choice(TEXTS)] = changed.get(name, np.zeros(1, np.float32))
        return changed
    array = changed.get(name, np.zeros(1, np.float32))
    if action == 2:
        changed[name] = array.astype(rng.choice((np.float64, np.int8, np.uint8, np.complex64)))
    elif action == 3:
        changed[name] = array.reshape(*array.shape, 1)
    elif action == 4:
        changed[name] = array[:-1] if array.ndim else array.reshape(1)
    elif action == 5:
        changed[name] = np.concatenate([array, array]) if array.ndim else np.stack([array, array])
    elif action == 6:
        changed[name] = np.stack([array, array], -1)[..., 0]  # the same numbers, not contiguous
        if changed[name].size:
            changed[name].flat[rng.randrange(changed[name].size)] = _number(changed[name], rng)
    else:
        own = array.copy()
        if own.size:
            own.flat[rng.randrange(own.size)] = _number(own, rng)
        changed[name] = own
    return changed


def _number(array: np.ndarray, rng: Random) -> Any:
    if array.dtype.kind == "f":
        info = np.finfo(array.dtype)
        return rng.choice((np.nan, np.inf, -np.inf, float(info.max), float(info.min), -1.0, 0.0, 2.0))
    if array.dtype.kind == "b":
        return rng.random() < 0.5
    limits = np.iinfo(array.dtype)
    return rng.choice((limits.min, limits.max, 0, 1))


# --- whole contents --------------------------------------------------------------------------------


def mutate_content(
    content: RecordDict, rng: Random, protos: Sequence[tuple[str, str, type[Proto]]] = ()
) -> RecordDict:
    """Return a message's content with one record changed.

    Parameters
    ----------
    content : RecordDict
        As it was sent.
    rng : Random
        What is drawn from.
    protos : sequence of (str, str, type)
        Record, key and class of the protobufs in it.
    """
    changed = RecordDict(dict(content.items()))
    names = sorted(changed)
    name = rng.choice(names) if names else "arrays"
    action = rng.random()
    if protos and action < 0.5:
        record, key, kind = protos[rng.randrange(len(protos))]
        held = changed.get(record)
        if isinstance(held, ConfigRecord) and isinstance(data := held.get(key), bytes):
            if rng.random() < 0.3:
                data = mutate_bytes(data, rng)
            else:
                data = mutate_proto(kind.FromString(data), rng).SerializeToString()
            changed[record] = ConfigRecord({**held, key: data})
            return changed
    if action < 0.55 and names:
        del changed[name]
    elif action < 0.58 and names:
        # A record under another's name: one that belongs to the message, or that no message has.
        changed[rng.choice(("head", "code", "sums", "arrays", *names))] = changed[name]
    elif action < 0.6:
        changed[rng.choice(("x", *names))] = rng.choice((ConfigRecord({}), MetricRecord({}), ArrayRecord()))
    else:
        changed[name] = _mutate_record(changed.get(name), rng)
    return changed


def _mutate_record(record: Any, rng: Random) -> Any:
    if isinstance(record, ArrayRecord) and len(record):
        arrays = dict(record.items())
        name = rng.choice(sorted(arrays))
        action = rng.random()
        if action < 0.1:
            del arrays[name]
        elif action < 0.2:
            arrays[rng.choice(TEXTS)] = arrays[name]
        else:
            arrays[name] = mutate_array(arrays[name], rng)
        return ArrayRecord(arrays)
    if isinstance(record, ConfigRecord | MetricRecord):
        values: dict[str, Any] = dict(record)
        name = rng.choice(sorted(values)) if values and rng.random() < 0.8 else rng.choice(TEXTS)
        numbers: tuple[Any, ...] = (
            *REALS,
            -1,
            0,
            2**63 - 1,
            -(2**63),
            [],
            [1.0, float("nan")],
            [1],
            [1.0] * 999,
        )
        if rng.random() < 0.15:
            values.pop(name, None)
        elif isinstance(record, MetricRecord):
            values[name] = rng.choice(numbers)
        else:
            values[name] = rng.choice(
                (*numbers, b"", b"\xff" * 9, "x" * 10_000, "", "\0", True, ["a"], [b"b"])
            )
        return type(record)(values)
    return ConfigRecord({"x": 1})
