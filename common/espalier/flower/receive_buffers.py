"""Arrays that are on their way: each chunk goes to its place when it comes, so there is never a second copy of them."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from flwr.app import Array
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, SType

from espalier.flower.arrays import blank_bytes, npy_size
from espalier.flower.framing import Buffer
from espalier.flower.memory import BIG_BLOCK
from espalier.flower.payloads import UNREADABLE, Content, chunk_head, describe, head_of, parts

CHUNK = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE


@dataclass(slots=True)
class _Room:
    """The bytes of one Array, and their memory to write to."""

    chunks: list[str]
    data: bytes
    memory: np.ndarray


class Rooms:
    """The Arrays of which an object says how large they are before their chunks come.

    Any other chunk stays what it is, and is copied to its Array's bytes when all are there.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rooms: dict[str, _Room] = {}
        self._places: dict[str, list[tuple[_Room, int]]] = {}

    def expect(self, object_id: str, content: Content) -> int:
        """Look at an object; the chunks of a big Array have places from now on. Return its bytes, 0 if it is none.

        Its word is taken only where chunks of Flower's size add up to the size of its shape.
        """
        try:
            kind, child_ids, _, _ = head_of(content)
            if kind != Array.__qualname__:
                return 0
            described = describe(parts(content)[2], child_ids)
            size = npy_size(described.dtype, described.shape) if described.stype == SType.NUMPY else 0
        except UNREADABLE:
            return 0  # whoever puts it together says what is wrong
        chunks = described.order
        if size < BIG_BLOCK or -(-size // CHUNK) != len(chunks) or len(set(chunks)) < len(chunks):
            return 0
        with self._lock:
            if object_id not in self._rooms:
                try:
                    # Before the first chunk: that would lie where the last Array was, and leave no room there for this.
                    room = _Room(chunks, *blank_bytes(size))
                except MemoryError:  # it may claim what never comes
                    return 0
                self._rooms[object_id] = room
                for place, chunk in enumerate(chunks):
                    self._places.setdefault(chunk, []).append((room, place))
        return size

    def take(self, object_id: str, content: Buffer) -> Content:
        """Put a chunk in its places, and return where it lies from now on; anything else is returned as it is."""
        with self._lock:
            places = list(self._places.get(object_id, ()))
        if not places:
            return content
        try:
            kind, child_ids, body = parts(content)
        except UNREADABLE:
            return content  # whoever puts the message together refuses it, and says what is wrong
        if kind != ArrayChunk.__qualname__ or child_ids:
            return content
        kept: Content = content
        for room, place in places:
            start, end = place * CHUNK, min((place + 1) * CHUNK, len(room.data))
            if len(body) != end - start:
                continue
            room.memory[start:end] = np.frombuffer(body, np.uint8)
            kept = chunk_head(len(body)), memoryview(room.data)[start:end]
        return kept

    def forget(self, object_id: str) -> None:
        """Give up the room of an Array; chunks that lie there stay."""
        with self._lock:
            room = self._rooms.pop(object_id, None)
            for chunk in room.chunks if room is not None else ():
                left = [place for place in self._places[chunk] if place[0] is not room]
                if left:
                    self._places[chunk] = left
                else:
                    del self._places[chunk]

    def clear(self) -> None:
        """Give up all rooms."""
        with self._lock:
            self._rooms.clear()
            self._places.clear()
