"""Splits messages into Flower's content-addressed objects and assembles them again, with fewer copies than Flower."""

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
from espalier.flower.memory import LARGE_BLOCK, LARGE_PAYLOAD, TRIM_THRESHOLD, retains_freed_blocks, trim_heap

# Levels of a message's object tree: Message, RecordDict, record, Array, chunk.
MAX_DEPTH = 5
#: Equal chunks are transferred once, so a message may be larger than the bytes received (all zeros are one chunk). The
#: size of a message is limited to MAX_REPEATED bytes plus MAX_TIMES the bytes received.
MAX_REPEATED, MAX_TIMES = 2**30, 16
#: Number of chunks (5 MiB) from which on an upload is big, and huge (over 60 MiB); see `espalier_edge.fleet.uploads`.
BIG_CHUNKS, HUGE_CHUNKS = 2, 13
# Longer than the header of any chunk; only an object with many children has a longer one.
SHORT_HEAD = 256

#: The content of an object: one buffer, or the header and the body of a chunk.
Content: TypeAlias = Buffer | tuple[bytes, memoryview]
#: Exceptions that parsing a malformed object may raise.
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
    """The objects of a received message do not form a message."""


def chunk_head(size: int) -> bytes:
    """Return Flower's header of a chunk of `size` bytes."""
    head = f"{ArrayChunk.__qualname__}{HEAD_VALUE_DIVIDER}{HEAD_VALUE_DIVIDER}{size}"
    return head.encode() + HEAD_BODY_DIVIDER


def _slice(array: Array) -> None:
    """Fill the cache of an Array's chunks; Flower's own slicing copies every chunk three times to hash it."""
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
    """A message in the form that Flower transfers: a tree of object ids, and the objects by id."""

    message_id: str
    tree: ObjectTree
    objects: Mapping[str, InflatableObject]

    def content(self, object_id: str) -> bytes:
        """Serialise one object."""
        return b"".join(self.pieces(object_id))

    def pieces(self, object_id: str) -> tuple[Buffer, ...]:
        """Serialise one object as a sequence of buffers; the body of a chunk is a view."""
        item = self.objects[object_id]
        if isinstance(item, ArrayChunk):
            return chunk_head(len(item.data)), item.data
        return (item.deflate(),)


def pack(message: Message) -> Packed:
    """Split a message into objects and set its message id.

    Arrays that were packed before (the same objects, sent to another node) are neither sliced nor hashed again.
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


def _walk(item: InflatableObject, object_id: str, objects: dict[str, InflatableObject]) -> ObjectTree:
    children = [_walk(child, child_id, objects) for child_id, child in (item.children or {}).items()]
    objects[object_id] = item
    return ObjectTree(object_id=object_id, children=children)


def array_bytes(message: Message) -> int:
    """Count the bytes of a message's Arrays."""
    records = message.content.values() if message.has_content() else ()
    return sum(
        len(array.data) for record in records if isinstance(record, ArrayRecord) for array in record.values()
    )


def content_id(record: ArrayRecord) -> bytes:
    """Return the SHA-256 of a payload: of the names, dtypes, shapes and chunks of its Arrays.

    This is Flower's object id, which a transfer needs anyway: the sender computes it once, and a receiver whose
    :func:`unpack` read verified objects does not compute it again.
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
    """Return the ids of a message's array chunks, the leaves at the deepest level."""
    level = [tree]
    for _ in range(1, MAX_DEPTH):
        level = [child for node in level for child in node.children]
    return {node.object_id for node in level}


def count_chunks(tree: ObjectTree, depth: int = 1) -> int:
    """Count the array chunks of a message: an upper bound of its size in units of 5 MiB."""
    if depth >= MAX_DEPTH:
        return 1
    return sum(count_chunks(child, depth + 1) for child in tree.children)


def unpack(
    message_id: str, contents: dict[str, bytes] | dict[str, Content], *, verified: bool = False
) -> Message:
    """Assemble a message from its objects; empties `contents` meanwhile, so that only one copy of the data is alive.

    Parameters
    ----------
    message_id : str
        Object id of the message.
    contents : dict of str to Content
        Every object of the message's tree. An Array whose chunks are consecutive views of one `bytes` object (see
        `espalier.flower.receive_buffers`) uses that object without a copy.
    verified : bool
        Whether each object is known to match its id; payloads then keep their ids.

    Returns
    -------
    Message
        The message, with its message id set.

    Raises
    ------
    PayloadError
        If an object is missing, malformed or of an unexpected type.
    """
    try:
        message = _Inflation(contents, verified).inflate(message_id, 1)
    except UNREADABLE as fault:
        raise PayloadError(f"its objects do not form a message ({type(fault).__name__}: {fault})") from fault
    if not isinstance(message, Message):
        raise PayloadError(f"its root object is a {type(message).__name__}, not a Message")
    if message.has_content() and not isinstance(message.content, RecordDict):
        raise PayloadError(f"its content is a {type(message.content).__name__}, not a RecordDict")
    message.metadata.__dict__["_message_id"] = message_id
    return message


class _Inflation:
    """Assembles one message, and frees every chunk as soon as the last Array that needs it has its bytes."""

    def __init__(self, contents: dict[str, bytes] | dict[str, Content], verified: bool) -> None:
        self._contents = contents
        self._verified = verified
        self._done: dict[str, InflatableObject] = {}
        self._budget = MAX_REPEATED + MAX_TIMES * sum(_size(content) for content in contents.values())
        # Equal chunks are one object, which several Arrays may use, or one Array several times.
        self._uses = Counter(child for content in contents.values() for child in head_of(content)[1])

    def inflate(self, object_id: str, depth: int) -> InflatableObject:
        if object_id in self._done:
            return self._done[object_id]
        if depth > MAX_DEPTH:
            raise ValueError("the object tree is deeper than any message")
        content = self._contents.pop(object_id)
        kind, child_ids, body = parts(content)
        cls = inflatable_class_registry[kind]
        item: InflatableObject
        if cls is Array:
            item = self._join(body, child_ids)
        else:
            children = {child: self.inflate(child, depth + 1) for child in child_ids}
            # bytes() of bytes makes no copy.
            whole = b"".join(content) if isinstance(content, tuple) else bytes(content)
            item = cls.inflate(whole, children=children)
        if self._verified and isinstance(item, ArrayRecord):
            _set_object_ids(item, object_id, json.loads(bytes(body)))
        self._done[object_id] = item
        return item

    def _join(self, body: memoryview, child_ids: list[str]) -> Array:
        """Build an Array from its chunks with one copy, or none (Flower's own inflation makes three)."""
        described = describe(body, child_ids)
        order = described.order
        chunks: dict[str, memoryview] = {}
        for child in child_ids:
            kind, _, chunks[child] = parts(self._contents[child])
            if inflatable_class_registry[kind] is not ArrayChunk:
                raise ValueError("an Array has children that are not chunks")
        size = sum(len(chunks[child]) for child in order)
        self._budget -= size
        if self._budget < 0:  # a short description may refer to a chunk a million times
            raise ValueError("an Array repeats its chunks beyond the size limit")
        data = in_place([chunks[child] for child in order], size)
        if size > LARGE_PAYLOAD and not retains_freed_blocks():
            trim_heap()  # return the memory of the calls that transferred the chunks
        if data is None and size >= LARGE_BLOCK:
            data = self._fill(size, order, chunks)
        else:
            data = b"".join([chunks[child] for child in order]) if data is None else data
            for child in child_ids:
                self._used(child)
        return Array(dtype=described.dtype, shape=described.shape, stype=described.stype, data=data)

    def _fill(self, size: int, order: list[str], chunks: dict[str, memoryview]) -> bytes:
        """Copy the chunks in order, freeing each after its last use; untouched zero pages take no memory."""
        last = {child: place for place, child in enumerate(order)}
        data, memory = blank_bytes(size)
        at = 0
        for place, child in enumerate(order):
            if place and size > TRIM_THRESHOLD and not retains_freed_blocks():
                trim_heap()  # otherwise the pages of freed chunks stay resident: a second copy of the Array
            end = at + len(chunks[child])
            memory[at:end] = np.frombuffer(chunks[child], np.uint8)
            at = end
            if place == last[child]:
                del chunks[child]
                self._used(child)
        return data

    def _used(self, chunk: str) -> None:
        """Free a chunk after its last use."""
        self._uses[chunk] -= 1
        if not self._uses[chunk]:
            del self._contents[chunk]


@dataclass(frozen=True, slots=True)
class Described:
    """The description of an Array: its dtype, shape, serialisation, and the ids of its chunks in order."""

    dtype: str
    shape: tuple[int, ...]
    stype: str
    order: list[str]


def describe(body: memoryview, child_ids: list[str]) -> Described:
    """Parse the object of an Array; raises one of `UNREADABLE` if it is malformed."""
    description = json.loads(bytes(body))
    places = [int(index) for index in description["arraychunk_ids"]]
    order = [child_ids[place] for place in places]
    if set(order) != set(child_ids) or any(place < 0 for place in places):
        raise ValueError("an Array does not refer to each of its chunks")
    return Described(
        str(description["dtype"]),
        tuple(int(n) for n in description["shape"]),
        str(description["stype"]),
        order,
    )


def in_place(pieces: Sequence[memoryview], size: int) -> bytes | None:
    """Return the `bytes` object that these consecutive views cover; None if they do not cover one exactly."""
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
    """Parse the header of an object: its type, the ids of its children, the size of the body, and the body's offset."""
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
    """Split an object into its type, the ids of its children and its body; raises ValueError if it is malformed."""
    kind, child_ids, size, start = head_of(content)
    body = content[1] if isinstance(content, tuple) else memoryview(content)[start:]
    if len(body) != size:
        raise ValueError(f"a {kind} has {len(body)} bytes, its header says {size}")
    return kind, child_ids, body


def _set_object_ids(record: ArrayRecord, object_id: str, array_ids: Mapping[str, str]) -> None:
    """Fill Flower's caches of object ids, which become stale if the record or an Array is modified."""
    for name, array in record.items():  # the record's own copies, not the Arrays that it was inflated from
        array.__dict__["_object_id"], array.is_dirty = array_ids[name], False
    record.__dict__["_object_id"], record.is_dirty = object_id, False
