"""A queue of big uploads, which bounds the memory of a server that receives many replies at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from espalier.config.timeouts import UPLOAD_STALL


@dataclass
class Upload:
    """A reply that is being received: announced, with objects outstanding."""

    node_id: int
    instruction_id: str
    big: bool
    huge: bool = False
    reply_id: str = ""
    session_id: str = ""
    pending: set[str] = field(default_factory=set)
    progress_at: float = field(default_factory=time.monotonic)

    @property
    def complete(self) -> bool:
        """Whether every object has arrived."""
        return bool(self.reply_id) and not self.pending


class Uploads:
    """The uploads to a server: at most `slots` big ones, or a single huge one, at a time.

    A big upload occupies one slot, a huge one all of them, from before its first byte until the reply has been
    processed or the upload is abandoned.

    Parameters
    ----------
    slots : int
        Number of big uploads that may be in memory.
    stall : float
        Seconds without a new object after which an unfinished upload is abandoned.
    """

    def __init__(self, slots: int, stall: float = UPLOAD_STALL) -> None:
        self._slots = self._free = slots
        self._stall = stall
        self._lock = threading.Condition()
        self._by_instruction: dict[str, Upload] = {}
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """Number of uploads in the queue."""
        return self._waiting

    def admit(self, upload: Upload, wanted: Callable[[], bool]) -> bool:
        """Wait until an upload may start; return False if it is no longer wanted.

        Parameters
        ----------
        upload : Upload
            Replaces an earlier, unfinished one for the same instruction (of a node that was restarted).
        wanted : callable
            Called about once a second; returns whether the reply is still expected.
        """
        with self._lock:
            self._drop_locked(upload.instruction_id)
            needed = self._needed(upload)
            if needed:
                self._waiting += 1
                try:
                    while wanted() and self._free < needed:
                        self._lock.wait(1.0)
                finally:
                    self._waiting -= 1
                if self._free < needed:
                    return False
            if not wanted():
                return False
            self._free -= needed
            upload.progress_at = time.monotonic()
            self._by_instruction[upload.instruction_id] = upload
            return True

    def find(self, session_id: str) -> Upload | None:
        """Return the upload of a push session."""
        with self._lock:
            for upload in self._by_instruction.values():
                if session_id and upload.session_id == session_id:
                    return upload
        return None

    def of(self, instruction_id: str) -> Upload | None:
        """Return the upload that answers an instruction."""
        with self._lock:
            return self._by_instruction.get(instruction_id)

    def arrived(self, upload: Upload, object_id: str) -> bool:
        """Record an object that has arrived; return whether the upload is complete."""
        with self._lock:
            upload.progress_at = time.monotonic()
            upload.pending.discard(object_id)
            return upload.complete

    def release(self, instruction_id: str) -> Upload | None:
        """Forget an upload and free its slot."""
        with self._lock:
            return self._drop_locked(instruction_id)

    def _needed(self, upload: Upload) -> int:
        return self._slots if upload.huge else int(upload.big)

    def _drop_locked(self, instruction_id: str) -> Upload | None:
        upload = self._by_instruction.pop(instruction_id, None)
        if upload is not None:
            self._free += self._needed(upload)
        self._lock.notify_all()
        return upload

    def stalled(self) -> list[Upload]:
        """Return the unfinished uploads without progress."""
        oldest = time.monotonic() - self._stall
        with self._lock:
            return [up for up in self._by_instruction.values() if not up.complete and up.progress_at < oldest]

    def wake(self) -> None:
        """Have the queued uploads check whether they are still wanted."""
        with self._lock:
            self._lock.notify_all()
