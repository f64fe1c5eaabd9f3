"""Flower's in-memory object store, taught not to keep, nor hash again, what this process itself sends."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

RECENT = 4  # objects: clients that are called together ask for the same ones at about the same time


class PayloadStore(InMemoryObjectStore):
    """An object store whose own objects are made when somebody asks for them.

    A payload for many clients then lies in memory once, as the Arrays that were sent, and no second time as objects.
    What others put into the store is verified as ever.
    """

    def __init__(self) -> None:
        super().__init__(verify=True)
        self._recent: OrderedDict[str, bytes] = OrderedDict()

    def offer(self, object_id: str, make: Callable[[], bytes]) -> None:
        """Have a preregistered object made when it is asked for.

        Parameters
        ----------
        object_id : str
            Its id, which the caller answers for.
        make : callable
            Returns its content, the same bytes each time.
        """
        with self.lock_store:
            entry = self.store[object_id]
            if not entry.is_available:
                entry.content, entry.is_available = cast(Any, make), True

    def get(self, object_id: str) -> bytes | None:
        """Return an object's content, b"" if it has not come yet and None if nobody announced it."""
        with self.lock_store:
            content: Any = super().get(object_id)
            if not callable(content):
                return cast("bytes | None", content)
            made = self._recent.pop(object_id, None) or content()
            self._recent[object_id] = made
            while len(self._recent) > RECENT:
                self._recent.popitem(last=False)
            return cast(bytes, made)

    def put(self, object_id: str, object_content: bytes) -> None:
        """Put what another has sent into the store, verified as in Flower's own."""
        with self.lock_store:
            self._recent.clear()  # who answers has what was sent, and the room is needed
        super().put(object_id, object_content)

    def delete(self, object_id: str) -> None:
        """Delete an object and its descendants that nothing else refers to."""
        with self.lock_store:
            super().delete(object_id)
            for recent in [key for key in self._recent if key not in self.store]:
                del self._recent[recent]
