"""Takes messages apart into Flower's content-addressed objects, and puts them together again, with few copies."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_head_values_from_object_content,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry
from google.protobuf.message import DecodeError

from espalier.flower.arrays import blank_bytes
from espalier.flower.framing import Buffer
from espalier.flower.memory import BIG_BLOCK, KEPT, MUCH, give_back_freed, keeps_freed_blocks

# Message, RecordDict, record, Array, chunk: nothing that Flower builds is deeper.
MAX_DEPTH = 5
#: Equal chunks travel once, so a message may be larger than what came of it: by so much, in bytes, and so many times.
#: (A payload of nothing but zeros is one chunk; no more than this of them is any model's.)
MAX_REPEATED, MAX_TIMES = 2**30, 16
#: Chunks of 5 MiB from which on an upload is big, and huge (over 60 MiB); see `espalier_edge.fleet.uploads`.
BIG_CHUNKS, HUGE_CHUNKS = 2, 13
# A chunk's head ends long before; only an object with many children has a longer one.
SHORT_HEAD = 256

#: An object in one piece, or a chunk's head and its bytes.
Content: TypeAlias = Buffer | tuple[bytes, memoryview]
#: What reading an object raises that is none.
UNREADABLE = (
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    RecursionError,
    ArithmeticError,
    DecodeError,
)


class PayloadError(ValueError):
    """The objects of a received message do not fit together."""


def chunk_head(size: int) -> bytes:
    """Return the header that Flower puts before a chunk of `size` bytes."""
    head = f"{ArrayChunk.__qualname__}{HEAD_VALUE_DIVIDER}{HEAD_VALUE_DIVIDER}{size}"
    return head.encode() + HEAD_BODY_DIVIDER


def _slice(array: Array) -> None:
    """Fill the Array's cache of chunks; Flower's own slicing copies every chunk three times to hash it."""
    if "_chunks" in array.__dict__:
        return
    chunks: list[tuple[str, InflatableObject]] = []
    view = memoryview(array.data)
    for start in range(0, len(view), FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE):
        piece = view[start : start + FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE]
        digest = hashlib.sha256(chunk_head(len(piece)))
        digest.update(piece)
        chunks.append((digest.hexdigest(), ArrayChunk(piece)))
    array.__dict__["_chunks"] = chunks


@dataclass(frozen=True)
class Packed:
    """A message as Flower's links carry it: a tree of object ids, and the objects by id."""

    message_id: str
    tree: ObjectTree
    objects: Mapping[str, InflatableObject]

    def content(self, object_id: str) -> bytes:
        """Serialise one object."""
        return b"".join(self.pieces(object_id))

    def pieces(self, object_id: str) -> tuple[Buffer, ...]:
        """Serialise one object without joining its pieces; a chunk's bytes are a view."""
        held = self.objects[object_id]
        if isinstance(held, ArrayChunk):
            return chunk_head(len(held.data)), held.data
        return (held.deflate(),)


def pack(message: Message) -> Packed:
    """Take a message apart and stamp it with its message id.

    Arrays that were packed before (the same objects, sent to another node) are neither sliced nor hashed
    again.
    """
    with no_object_id_recompute():
        if message.has_content():
            for record in message.content.values():
                if isinstance(record, ArrayRecord):
                    for array in record.values():
                        _slice(array)
        objects: dict[str, InflatableObject] = {}
        tree = _walk(message, message.object_id, objects)
        message.metadata.__dict__["_message_id"] = tree.object_id
    return Packed(tree.object_id, tree, objects)


def _walk(held: InflatableObject, object_id: str, objects: dict[str, InflatableObject]) -> ObjectTree:
    children = [_walk(child, child_id, objects) for child_id, child in (held.children or {}).items()]
    objects[object_id] = held
    return ObjectTree(object_id=object_id, children=children)


def array_bytes(message: Message) -> int:
    """Count the bytes of a message's Arrays."""
    records = message.content.values() if message.has_content() else ()
    return sum(
        len(array.data) for record in records if isinstance(record, ArrayRecord) for array in record.values()
    )


def content_id(record: ArrayRecord) -> bytes:
    """Return the SHA-256 that names a payload: of its Arrays' names, dtypes, shapes and, by chunks, bytes.

    It is Flower's own object id. A link needs it in any case, so it is computed once at the sender and, of a
    payload that :func:`unpack` read from verified objects, not at all.
    """
    for array in record.values():
        if array.is_dirty:
            _slice(array)
    return bytes.fromhex(record.object_id)


def tree_ids(tree: ObjectTree) -> list[str]:
    """List the distinct object ids of a tree, children first."""
    ids: dict[str, None] = {}

    def visit(node: ObjectTree, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise PayloadError("the object tree is deeper than any message")
        for child in node.children:
            visit(child, depth + 1)
        ids[node.object_id] = None

    visit(tree, 1)
    return list(ids)


def chunk_ids(tree: ObjectTree) -> set[str]:
    """Return the ids of a message's array chunks: what lies deepest."""
    level = [tree]
    for _ in range(1, MAX_DEPTH):
        level = [child for node in level for child in node.children]
    return {node.object_id for node in level}


def count_chunks(tree: ObjectTree, depth: int = 1) -> int:
    """Count the array chunks in a message's tree: an upper bound of its size in units of 5 MiB."""
    if depth >= MAX_DEPTH:
        return 1
    return sum(count_chunks(child, depth + 1) for child in tree.children)


def unpack(
    message_id: str, contents: dict[str, bytes] | dict[str, Content], *, verified: bool = False
) -> Message:
    """Put a message together; `contents` is emptied on the way, so that no more than one copy is alive.

    Parameters
    ----------
    message_id : str
        Object id of the message.
    contents : dict of str to Content
        Every object of the message's tree. An Array whose chunks lie one after another in bytes of their own
        (see `espalier.flower.receive_buffers`) has these, without a copy.
    verified : bool
        Whether each object is known to be what its id is the hash of; then payloads keep their ids.

    Returns
    -------
    Message
        With its message id set.

    Raises
    ------
    PayloadError
        If an object is missing, malformed or of an unexpected type.
    """
    try:
        message = _Inflation(contents, verified).inflate(message_id, 1)
    except UNREADABLE as fault:
        raise PayloadError(f"its objects do not fit together ({type(fault).__name__}: {fault})") from fault
    if not isinstance(message, Message):
        raise PayloadError(f"its root object is a {type(message).__name__}, not a Message")
    if message.has_content() and not isinstance(message.content, RecordDict):
        raise PayloadError(f"its content is a {type(message.content).__name__}, not a RecordDict")
    message.metadata.__dict__["_message_id"] = message_id
    return message


class _Inflation:
    """One message being put together: frees every chunk as soon as its last Array has its bytes."""

    def __init__(self, contents: dict[str, bytes] | dict[str, Content], verified: bool) -> None:
        self._contents = contents
        self._verified = verified
        self._done: dict[str, InflatableObject] = {}
        self._room = MAX_REPEATED + MAX_TIMES * sum(_size(content) for content in contents.values())
        # Equal chunks are one object, so several Arrays, or one several times, may need it.
        self._uses = Counter(child for content in contents.values() for child in head_of(content)[1])

    def inflate(self, object_id: str, depth: int) -> InflatableObject:
        if object_id in self._done:
            return self._done[object_id]
        if depth > MAX_DEPTH:
            raise ValueError("the object tree is deeper than any message")
        content = self._contents.pop(object_id)
        kind, child_ids, body = parts(content)
        cls = inflatable_class_registry[kind]
        held: InflatableObject
        if cls is Array:
            held = self._join(body, child_ids)
        else:
            children = {child: self.inflate(child, depth + 1) for child in child_ids}
            # No copy of what is bytes.
            whole = b"".join(content) if isinstance(content, tuple) else bytes(content)
            held = cls.inflate(whole, children=children)
        if self._verified and isinstance(held, ArrayRecord):
            _keep_ids(held, object_id, json.loads(bytes(body)))
        self._done[object_id] = held
        return held

    def _join(self, body: memoryview, child_ids: list[str]) -> Array:
        """Build an Array from its chunks with one copy (Flower's own inflation makes three), chunk by chunk."""
        described = describe(body, child_ids)
        order = described.order
        chunks: dict[str, memoryview] = {}
        for child in child_ids:
            kind, _, chunks[child] = parts(self._contents[child])
            if inflatable_class_registry[kind] is not ArrayChunk:
                raise ValueError("an Array has children that are no chunks")
        size = sum(len(chunks[child]) for child in order)
        self._room -= size
        if self._room < 0:  # a few characters may name a chunk a million times
            raise ValueError("an Array repeats its chunks until no memory holds it")
        data = in_place([chunks[child] for child in order], size)
        if size > MUCH and not keeps_freed_blocks():
            give_back_freed()  # what the calls took that brought the chunks
        if data is None and size >= BIG_BLOCK:
            data = self._fill(size, order, chunks)
        else:
            data = b"".join([chunks[child] for child in order]) if data is None else data
            for child in child_ids:
                self._used(child)
        return Array(dtype=described.dtype, shape=described.shape, stype=described.stype, data=data)

    def _fill(self, size: int, order: list[str], chunks: dict[str, memoryview]) -> bytes:
        """Put chunks in their order, each freed after its last place; zeros that nobody has touched take no memory."""
        last = {child: place for place, child in enumerate(order)}
        data, room = blank_bytes(size)
        at = 0
        for place, child in enumerate(order):
            if place and size > KEPT and not keeps_freed_blocks():
                give_back_freed()  # or the chunks' pages would stay beside the Array: a second copy
            end = at + len(chunks[child])
            room[at:end] = np.frombuffer(chunks[child], np.uint8)
            at = end
            if place == last[child]:
                del chunks[child]
                self._used(child)
        return data

    def _used(self, chunk: str) -> None:
        """Free a chunk if no other Array needs it."""
        self._uses[chunk] -= 1
        if not self._uses[chunk]:
            del self._contents[chunk]


@dataclass(frozen=True, slots=True)
class Described:
    """What an Array's object says: what it holds, and its chunks in their order."""

    dtype: str
    shape: tuple[int, ...]
    stype: str
    order: list[str]


def describe(body: memoryview, child_ids: list[str]) -> Described:
    """Read an Array's object; raises what `UNREADABLE` names where it is none."""
    said = json.loads(bytes(body))
    places = [int(index) for index in said["arraychunk_ids"]]
    order = [child_ids[place] for place in places]
    if set(order) != set(child_ids) or any(place < 0 for place in places):
        raise ValueError("an Array does not name each of its chunks")
    return Described(str(said["dtype"]), tuple(int(n) for n in said["shape"]), str(said["stype"]), order)


def in_place(pieces: Sequence[memoryview], size: int) -> bytes | None:
    """Return the bytes that these views of them make up, one after another; None where they do not."""
    whole = pieces[0].obj if pieces else None
    if not isinstance(whole, bytes) or len(whole) != size or any(piece.obj is not whole for piece in pieces):
        return None
    at = _address(memoryview(whole))
    for piece in pieces:
        if not piece or _address(piece) != at:
            return None
        at += len(piece)
    return whole


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def _size(content: Content) -> int:
    return sum(map(len, content)) if isinstance(content, tuple) else len(content)


def head_of(content: Content) -> tuple[str, list[str], int, int]:
    """Return the type, the children's ids and the body's size as an object's head says, and where the body begins."""
    if isinstance(content, tuple):
        content = content[0]
    begin = bytes(content[:SHORT_HEAD])
    if (divider := begin.find(HEAD_BODY_DIVIDER)) < 0:
        begin = bytes(content)
        divider = begin.index(HEAD_BODY_DIVIDER)
    start = divider + len(HEAD_BODY_DIVIDER)
    kind, child_ids, size = get_object_head_values_from_object_content(begin[:start])
    return kind, child_ids, size, start


def parts(content: Content) -> tuple[str, list[str], memoryview]:
    """Return the type, the children's ids and the body of an object; raises ValueError where it is none."""
    kind, child_ids, size, start = head_of(content)
    body = content[1] if isinstance(content, tuple) else memoryview(content)[start:]
    if len(body) != size:
        raise ValueError(f"a {kind} has {len(body)} bytes and claims {size}")
    return kind, child_ids, body


def _keep_ids(record: ArrayRecord, object_id: str, array_ids: Mapping[str, str]) -> None:
    """Fill Flower's own caches of object ids; whoever changes the record or an Array makes them stale."""
    for name, array in record.items():  # the record's own copies, not what it was inflated from
        array.__dict__["_object_id"], array.is_dirty = array_ids[name], False
    record.__dict__["_object_id"], record.is_dirty = object_id, False
