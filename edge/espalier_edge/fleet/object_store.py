"""Flower's in-memory object store, taught not to keep, nor hash again, what this process itself sends."""

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
    """An object store whose own objects are made when somebody asks for them.

    A payload for many clients then lies in memory once, as the Arrays that were sent, and no second time as objects.
    What others put into the store is verified as ever.
    """

    def __init__(self) -> None:
        super().__init__(verify=True)
        self._buffers = ReceiveBuffers()
        self._has_sent = False

    def offer(self, object_id: str, make: Callable[[], Sequence[Buffer]]) -> None:
        """Have a preregistered object made when it is asked for.

        Parameters
        ----------
        object_id : str
            Its id, which the caller answers for.
        make : callable
            Returns the pieces of its content, of the same bytes each time.
        """
        self._keep(object_id, make)
        self._has_sent = True

    def _keep(self, object_id: str, content: Any) -> None:
        with self.lock_store:
            entry = self.store[object_id]
            if not entry.is_available:
                entry.content, entry.is_available = content, True

    def pieces(self, object_id: str) -> Sequence[Buffer] | None:
        """Return an offered object's content in pieces that are no copies, None of any other object."""
        with self.lock_store:
            entry = self.store.get(object_id)
            content: Any = entry.content if entry is not None else None
        return content() if callable(content) else None

    def get(self, object_id: str) -> bytes | None:
        """Return an object's content, b"" if it has not come yet and None if nobody announced it."""
        with self.lock_store:
            content: Any = super().get(object_id)
        return b"".join(content()) if callable(content) else cast("bytes | None", content)

    def held(self, object_id: str) -> Content:
        """Return an object's content without a copy, b"" where there is none."""
        found = self.pieces(object_id)
        if found is None:
            return self.get(object_id) or b""
        return (bytes(found[0]), memoryview(found[1])) if len(found) == 2 else b"".join(found)

    def put(self, object_id: str, object_content: Buffer) -> None:
        """Put what another has sent into the store, verified as in Flower's own.

        A chunk of an Array that is known goes to its place in there; any other one may stay where it came.
        """
        if isinstance(object_content, bytes):
            super().put(object_id, object_content)
            if self._buffers.allocate(object_id, object_content) > LARGE_PAYLOAD and self._has_sent:
                self._has_sent = False
                trim_heap()  # what sending took is in small pieces, and what comes is as large as a network
            return
        kind, child_ids, _ = parts(object_content)
        if kind != ArrayChunk.__qualname__ or child_ids:
            super().put(object_id, bytes(object_content))
            return
        if hashlib.sha256(object_content).hexdigest() != object_id:
            raise ValueError(f"Object ID {object_id} does not match content hash")
        kept: Any = self._buffers.place(object_id, object_content)
        if isinstance(kept, tuple):
            self._keep(object_id, lambda: kept)
            return
        self._keep(object_id, kept)

    def delete(self, object_id: str) -> None:
        """Delete an object that nobody refers to, and what only it referred to; Arrays lose their buffers."""
        super().delete(object_id)
        if object_id not in self:
            self._buffers.release(object_id)

    def clear(self) -> None:
        """Delete everything."""
        super().clear()
        self._buffers.clear()
