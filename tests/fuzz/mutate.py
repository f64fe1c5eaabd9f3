"""Seeded mutations of what crosses a link: bytes, protobufs, Flower Arrays and whole message contents."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message as Proto

#: Its classes differ by the build of protobuf, in mypy's eyes too.
Field: Any = FieldDescriptor

#: Repeated fields are blown up to so many entries, at most.
MANY = 30_000

_INTEGERS = {
    Field.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    Field.CPPTYPE_UINT32: (0, 2**32 - 1),
    Field.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    Field.CPPTYPE_UINT64: (0, 2**64 - 1),
    Field.CPPTYPE_ENUM: (0, 3),
}
_REALS = (
    float("nan"),
    float("inf"),
    float("-inf"),
    -1.0,
    0.0,
    -0.0,
    1e308,
    -1e308,
    5e-324,
    0.5,
    2.0**63,
    1e10,
)
_TEXTS = (
    "",
    "\0",
    "../../etc/passwd",
    "x" * 100_000,
    "\u202e\x1b[2J",
    "edge-2",
    "c1",
    "float32",
    "nan",
    "🌳",
)


# --- bytes -----------------------------------------------------------------------------------------


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """Return bytes with bits flipped, pieces cut, doubled, swapped or put in; not those that were given."""
    for _ in range(20):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            _BYTES[rng.randrange(len(_BYTES))](changed, rng)
        if bytes(changed) != data:
            return bytes(changed)
    return data + b"\x00"


def _flip(data: bytearray, rng: Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _truncate(data: bytearray, rng: Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _piece(data: bytearray, rng: Random) -> slice:
    start = rng.randrange(len(data) + 1)
    return slice(start, min(len(data), start + 1 + rng.randrange(64)))


def _delete(data: bytearray, rng: Random) -> None:
    del data[_piece(data, rng)]


def _double(data: bytearray, rng: Random) -> None:
    piece = _piece(data, rng)
    data[piece.start : piece.start] = data[piece] * rng.choice((1, 1, 2, 50))


def _insert(data: bytearray, rng: Random) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice((rng.randbytes(rng.randrange(1, 32)), b"\xff" * 10, b"\x00" * 8))


def _overwrite(data: bytearray, rng: Random) -> None:
    piece = _piece(data, rng)
    data[piece] = rng.choice((b"\xff", b"\x00", b"\x80", b"\x7f")) * (piece.stop - piece.start)


def _swap(data: bytearray, rng: Random) -> None:
    one, two = sorted((_piece(data, rng), _piece(data, rng)), key=lambda s: s.start)
    if one.stop <= two.start:
        data[:] = data[: one.start] + data[two] + data[one.stop : two.start] + data[one] + data[two.stop :]


_BYTES: tuple[Callable[[bytearray, Random], None], ...] = (
    _flip,
    _flip,
    _truncate,
    _delete,
    _double,
    _insert,
    _overwrite,
    _swap,
)


# --- protobufs -------------------------------------------------------------------------------------


def mutate_proto(message: Proto, rng: Random) -> Proto:
    """Return a copy with one to three fields driven to extremes, emptied, multiplied or swapped."""
    for _ in range(20):
        changed = type(message)()
        changed.CopyFrom(message)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            places = list(_fields(changed))
            owner, field = places[rng.randrange(len(places))]
            _change_field(owner, field, rng)
        if changed.SerializeToString(deterministic=True) != message.SerializeToString(deterministic=True):
            return changed
    return type(message)()


def _fields(message: Proto, depth: int = 0) -> Iterator[tuple[Proto, Any]]:
    """Yield every field of a message and of those in it; of long lists only the first few entries."""
    for field in message.DESCRIPTOR.fields:
        yield message, field
        if field.message_type is None or depth > 6 or _is_map(field):
            continue
        value = getattr(message, field.name)
        parts = list(value)[:8] if field.is_repeated else [value] if message.HasField(field.name) else []
        for part in parts:
            yield from _fields(part, depth + 1)


def _is_map(field: Any) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _change_field(owner: Proto, field: Any, rng: Random) -> None:
    if _is_map(field):
        _change_map(owner, field, rng)
    elif field.is_repeated:
        _change_list(getattr(owner, field.name), field, rng)
    elif field.message_type is not None:
        if rng.random() < 0.5:
            owner.ClearField(field.name)
        else:
            getattr(owner, field.name).SetInParent()
    elif rng.random() < 0.15:
        _swap_fields(owner, field, rng)
    else:
        setattr(owner, field.name, _scalar(field, getattr(owner, field.name), rng))


def _swap_fields(owner: Proto, field: Any, rng: Random) -> None:
    alike = [
        f
        for f in owner.DESCRIPTOR.fields
        if f.cpp_type == field.cpp_type and f.type == field.type and not f.is_repeated
    ]
    other = rng.choice(alike)
    mine, its = getattr(owner, field.name), getattr(owner, other.name)
    setattr(owner, field.name, its)
    setattr(owner, other.name, mine)


def _scalar(field: Any, former: Any, rng: Random) -> Any:
    if field.cpp_type in _INTEGERS:
        low, high = _INTEGERS[field.cpp_type]
        near = former if isinstance(former, int) else 0
        value = rng.choice((low, high, 0, 1, near + 1, near - 1, high // 2 + 1, rng.randint(low, high)))
        return min(max(value, low), high)
    if field.cpp_type == Field.CPPTYPE_DOUBLE:
        return rng.choice((*_REALS, rng.uniform(-10, 10)))
    if field.cpp_type == Field.CPPTYPE_FLOAT:
        return rng.choice((float("nan"), float("inf"), -1.0, 0.0, 3e38))
    if field.cpp_type == Field.CPPTYPE_BOOL:
        return not former
    if field.type == Field.TYPE_BYTES:
        return rng.choice((b"", rng.randbytes(32), mutate_bytes(former, rng), b"\xff" * 100_000))
    return rng.choice((*_TEXTS, former + "x", former[:-1]))


def _change_list(values: Any, field: Any, rng: Random) -> None:
    action = rng.randrange(6)
    if action == 0 or not values:
        if values:
            del values[:]
        elif field.message_type is None:
            values.append(_scalar(field, _ZERO.get(field.cpp_type, 0), rng))
        else:
            values.add()
        return
    at = rng.randrange(len(values))
    if action == 1:
        del values[at]
    elif action == 2:
        values.append(values[at])
    elif action == 3 and len(values) > 1:
        other, kept = rng.randrange(len(values)), list(values)
        kept[at], kept[other] = kept[other], kept[at]
        copies = [_copy(k) for k in kept]
        del values[:]
        values.extend(copies)
    elif action == 4 and rng.random() < 0.3:
        values.extend([_copy(values[at])] * (MANY if field.message_type is None else MANY // 10))
    elif field.message_type is None:
        values[at] = _scalar(field, values[at], rng)
    else:
        values[at].Clear()


_ZERO = {Field.CPPTYPE_STRING: ""}


def _copy(value: Any) -> Any:
    if not isinstance(value, Proto):
        return value
    other = type(value)()
    other.CopyFrom(value)
    return other


def _change_map(owner: Proto, field: Any, rng: Random) -> None:
    values = getattr(owner, field.name)
    key_field, value_field = (
        field.message_type.fields_by_name["key"],
        field.message_type.fields_by_name["value"],
    )
    keys = sorted(values)
    if keys and rng.random() < 0.3:
        del values[rng.choice(keys)]
        return
    fresh = _scalar(key_field, "", rng) if key_field.cpp_type == Field.CPPTYPE_STRING else 7
    key = rng.choice(keys) if keys and rng.random() < 0.8 else fresh
    if value_field.message_type is None:
        values[key] = _scalar(value_field, values.get(key, _ZERO.get(value_field.cpp_type, 0)), rng)
    else:
        inner = values[key]
        places = list(_fields(inner))
        _change_field(*places[rng.randrange(len(places))], rng)


# --- arrays ----------------------------------------------------------------------------------------


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
        values.flat[at] = rng.choice((info.min, info.max, 0))
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
        changed[rng.choice(_TEXTS)] = changed.get(name, np.zeros(1, np.float32))
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
            arrays[rng.choice(_TEXTS)] = arrays[name]
        else:
            arrays[name] = mutate_array(arrays[name], rng)
        return ArrayRecord(arrays)
    if isinstance(record, ConfigRecord | MetricRecord):
        values: dict[str, Any] = dict(record)
        name = rng.choice(sorted(values)) if values and rng.random() < 0.8 else rng.choice(_TEXTS)
        numbers: tuple[Any, ...] = (
            *_REALS,
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
