"""Buffers for Arrays in transit: each chunk is copied to its offset on arrival, so no second copy exists."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from flwr.app import Array
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, SType

from espalier.flower.arrays import blank_bytes, npy_size
from espalier.flower.framing import Buffer
from espalier.flower.memory import LARGE_BLOCK
from espalier.flower.payloads import UNREADABLE, Content, chunk_head, describe, head_of, parts

CHUNK = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE


@dataclass(slots=True)
class _Buffer:
    """The bytes of one Array, and a writable view of them."""

    chunks: list[str]
    data: bytes
    memory: np.ndarray


class ReceiveBuffers:
    """Buffers of the Arrays whose description, with their size, arrives before their chunks.

    Any other chunk stays as received, and is copied to its Array's bytes when the message is assembled.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buffers: dict[str, _Buffer] = {}
        self._slots: dict[str, list[tuple[_Buffer, int]]] = {}

    def allocate(self, object_id: str, content: Content) -> int:
        """Allocate a buffer if an object describes a large Array.

        The stated size is trusted only if chunks of Flower's size add up to the size of the stated shape.

        Parameters
        ----------
        object_id : str
            Id of the object.
        content : Content
            Its bytes, of any type of object.

        Returns
        -------
        int
            The size of the Array in bytes; 0 if nothing was allocated.
        """
        try:
            kind, child_ids, _, _ = head_of(content)
            if kind != Array.__qualname__:
                return 0
            described = describe(parts(content)[2], child_ids)
            size = npy_size(described.dtype, described.shape) if described.stype == SType.NUMPY else 0
        except UNREADABLE:
            return 0  # assembling the message raises the error
        chunks = described.order
        if size < LARGE_BLOCK or -(-size // CHUNK) != len(chunks) or len(set(chunks)) < len(chunks):
            return 0
        with self._lock:
            if object_id not in self._buffers:
                try:
                    # Before the first chunk, which would take and fragment the memory of the previous Array.
                    buffer = _Buffer(chunks, *blank_bytes(size))
                except MemoryError:  # the stated size may be wrong
                    return 0
                self._buffers[object_id] = buffer
                for index, chunk in enumerate(chunks):
                    self._slots.setdefault(chunk, []).append((buffer, index))
        return size

    def place(self, object_id: str, content: Buffer) -> Content:
        """Copy a chunk to its offsets and return a view of it there; return any other object unchanged."""
        with self._lock:
            slots = list(self._slots.get(object_id, ()))
        if not slots:
            return content
        try:
            kind, child_ids, body = parts(content)
        except UNREADABLE:
            return content  # assembling the message raises the error
        if kind != ArrayChunk.__qualname__ or child_ids:
            return content
        view: Content = content
        for buffer, index in slots:
            start, end = index * CHUNK, min((index + 1) * CHUNK, len(buffer.data))
            if len(body) != end - start:
                continue
            buffer.memory[start:end] = np.frombuffer(body, np.uint8)
            view = chunk_head(len(body)), memoryview(buffer.data)[start:end]
        return view

    def release(self, object_id: str) -> None:
        """Forget the buffer of an Array; views of it stay valid."""
        with self._lock:
            buffer = self._buffers.pop(object_id, None)
            for chunk in buffer.chunks if buffer is not None else ():
                left = [slot for slot in self._slots[chunk] if slot[0] is not buffer]
                if left:
                    self._slots[chunk] = left
                else:
                    del self._slots[chunk]

    def clear(self) -> None:
        """Forget all buffers."""
        with self._lock:
            self._buffers.clear()
            self._slots.clear()
