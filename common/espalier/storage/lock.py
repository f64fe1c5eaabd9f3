"""Locks between processes, which the kernel releases when their holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from espalier.errors import StateError
from espalier.storage.atomic import write_error

#: The lock file of a folder that one process owns; it holds the owner's process id.
LOCK_FILE = "lock"

#: Seconds that an attempt waits at least: `is_locked` in another process holds a shared lock for an instant.
_GRACE = 0.2
_POLL = 0.02


class FolderLock:
    """Exclusive ownership of a folder, until `release` or the end of the process.

    Parameters
    ----------
    folder : Path
        Created if need be.
    timeout : float
        Seconds to wait for another owner to release it.

    Raises
    ------
    FolderInUseError
        Another process owns the folder.
    StateError
        The folder cannot be created or written to.
    """

    def __init__(self, folder: Path, timeout: float = 0.0) -> None:
        path = folder / LOCK_FILE
        self._lock = FileLock(path, timeout=max(timeout, _GRACE), thread_local=False)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(poll_interval=_POLL)
            path.write_text(str(os.getpid()))
        except Timeout:
            raise FolderInUseError(folder, holder(folder)) from None
        except OSError as error:
            self._lock.release()
            raise write_error(path, error) from error

    def release(self) -> None:
        """Release the folder; does nothing the second time."""
        self._lock.release()


class FolderInUseError(StateError):
    """Another process owns a folder.

    Attributes
    ----------
    holder : str
        Its process id, or ``"unknown"``.
    """

    def __init__(self, folder: Path, holder: str) -> None:
        super().__init__(
            f"the folder {folder} is in use by process {holder}; stop that process or choose another folder"
        )
        self.holder = holder


def is_locked(folder: Path) -> bool:
    """Return whether a process owns a folder, without taking ownership; read permission is enough."""
    try:
        with (folder / LOCK_FILE).open() as file:
            # A shared lock, which concurrent callers do not mistake for an owner's.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def holder(folder: Path) -> str:
    """Return the process id of a folder's last owner as text, ``"unknown"`` if the lock file does not hold one."""
    with contextlib.suppress(OSError):
        return (folder / LOCK_FILE).read_text().strip() or "unknown"
    return "unknown"


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Exclude other processes that change `path` in such a block; waits for them.

    The lock file stands in the same folder as ``.NAME.lock``; `path` itself may be replaced inside the block.

    Raises
    ------
    StateError
        The lock file cannot be written.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"), thread_local=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(poll_interval=_POLL)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        yield
    finally:
        lock.release()
