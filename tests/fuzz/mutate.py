"""Seeded mutations of what crosses a link: bytes and protobufs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

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
REALS = (
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
TEXTS = (
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
        return rng.choice((*REALS, rng.uniform(-10, 10)))
    if field.cpp_type == Field.CPPTYPE_FLOAT:
        return rng.choice((float("nan"), float("inf"), -1.0, 0.0, 3e38))
    if field.cpp_type == Field.CPPTYPE_BOOL:
        return not former
    if field.type == Field.TYPE_BYTES:
        return rng.choice((b"", rng.randbytes(32), mutate_bytes(former, rng), b"\xff" * 100_000))
    return rng.choice((*TEXTS, former + "x", former[:-1]))


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
