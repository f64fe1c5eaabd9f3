"""An in-memory object store that neither retains nor rehashes the objects that this process sends."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, cast

from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

from espalier.flower.framing import Buffer
from espalier.flower.memory import LARGE_PAYLOAD, trim_heap
from espalier.flower.payloads import Content, parts
from espalier.flower.receive_buffers import ReceiveBuffers


class PayloadStore(InMemoryObjectStore):
    """An object store that serialises outgoing objects on request.

    A payload for many clients is then in memory once, as the Arrays of the message, and not a second time as objects.
    Objects received from nodes are verified as in Flower's store.
    """

    def __init__(self) -> None:
        super().__init__(verify=True)
        self._buffers = ReceiveBuffers()
        self._has_sent = False

    def offer(self, object_id: str, make: Callable[[], Sequence[Buffer]]) -> None:
        """Register the function that serialises a preregistered object.

        Parameters
        ----------
        object_id : str
            Its id, which is not verified.
        make : callable
            Returns the content as a sequence of buffers, with the same bytes on every call.
        """
        self._store(object_id, make)
        self._has_sent = True

    def _store(self, object_id: str, content: Any) -> None:
        with self.lock_store:
            entry = self.store[object_id]
            if not entry.is_available:
                entry.content, entry.is_available = content, True

    def pieces(self, object_id: str) -> Sequence[Buffer] | None:
        """Return the content of an offered object as buffers, without a copy; None for any other object."""
        with self.lock_store:
            entry = self.store.get(object_id)
            content: Any = entry.content if entry is not None else None
        return content() if callable(content) else None

    def get(self, object_id: str) -> bytes | None:
        """Return the content of an object: b"" if it has not arrived yet, None if it was not announced."""
        with self.lock_store:
            content: Any = super().get(object_id)
        return b"".join(content()) if callable(content) else cast("bytes | None", content)

    def content(self, object_id: str) -> Content:
        """Return the content of an object without a copy, b"" if there is none."""
        found = self.pieces(object_id)
        if found is None:
            return self.get(object_id) or b""
        return (bytes(found[0]), memoryview(found[1])) if len(found) == 2 else b"".join(found)

    def put(self, object_id: str, object_content: Buffer) -> None:
        """Store a received object after verifying it.

        A chunk of an announced large Array is copied to its offset in the Array's buffer.
        """
        if isinstance(object_content, bytes):
            super().put(object_id, object_content)
            if self._buffers.allocate(object_id, object_content) > LARGE_PAYLOAD and self._has_sent:
                self._has_sent = False
                trim_heap()  # sending left small free blocks behind, and the Array is as large as a network
            return
        kind, child_ids, _ = parts(object_content)
        if kind != ArrayChunk.__qualname__ or child_ids:
            super().put(object_id, bytes(object_content))
            return
        if hashlib.sha256(object_content).hexdigest() != object_id:
            raise ValueError(f"Object ID {object_id} does not match content hash")
        placed: Any = self._buffers.place(object_id, object_content)
        if isinstance(placed, tuple):
            self._store(object_id, lambda: placed)
            return
        self._store(object_id, placed)

    def delete(self, object_id: str) -> None:
        """Delete an unreferenced object and objects that only it referred to, with the buffers of deleted Arrays."""
        super().delete(object_id)
        if object_id not in self:
            self._buffers.release(object_id)

    def clear(self) -> None:
        """Delete all objects."""
        super().clear()
        self._buffers.clear()
