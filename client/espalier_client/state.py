"""The versioned state of a client between rounds, which a cloud that resumes from a checkpoint can roll back."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from espalier.errors import StateError
from espalier.names import NAME_RULE, is_name
from espalier.storage.tensor_file import read_tensors, write_tensors

Version = tuple[int, int]
"""(window, round); (0, 0) is the state before any training."""

#: Maximum bytes of states that the process caches in memory, over all stores.
CACHE_BYTES = 64 << 20

_FILE = re.compile(r"w(\d+)-r(\d+)\.safetensors")


class _StateCache:
    """A cache of the states written last, as a client's next round usually loads the state that its last one wrote.

    Taking a state removes it from the cache, so two rounds never share arrays, and a round that fails falls back to
    the file.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: dict[Path, tuple[tuple[int, ...], dict[str, np.ndarray]]] = {}
        self._lock = threading.Lock()

    def put(self, path: Path, tensors: Mapping[str, np.ndarray]) -> None:
        """Cache the tensors that were written to a file; evict the oldest entries beyond the limit."""
        with self._lock:
            self._held.pop(path, None)
            # C-contiguous, as when read from a file: NumPy sums in memory order, so another layout rounds differently.
            whole = {n: np.ascontiguousarray(a).reshape(np.shape(a)) for n, a in tensors.items()}
            self._held[path] = (_mark(path), whole)
            while sum(_size(held) for _, held in self._held.values()) > self._limit:
                self._held.pop(next(iter(self._held)))

    def take(self, path: Path) -> dict[str, np.ndarray] | None:
        """Remove and return the tensors of a file; None if they are not cached or the file has changed since."""
        with self._lock:
            mark, tensors = self._held.pop(path, ((), {}))
        return tensors if mark and mark == _mark(path) else None

    def drop(self, folder: Path) -> None:
        """Remove the entries of a file, or of all files in a folder."""
        with self._lock:
            for path in [p for p in self._held if p == folder or p.parent == folder]:
                del self._held[path]


def _mark(path: Path) -> tuple[int, ...]:
    """Return the inode, size and modification time of a file, which detect a change; () if it does not exist."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _size(tensors: Mapping[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in tensors.values())


_cache = _StateCache(CACHE_BYTES)


class StateStore:
    """Stores named arrays per run and version, in files ``ROOT/RUN/wWINDOW-rROUND.safetensors``.

    Parameters
    ----------
    root : Path
        Folder of the store; created on the first write.
    keep_runs : int
        Maximum number of runs; saving another one deletes the least recently written run.
    """

    def __init__(self, root: Path, *, keep_runs: int = 4) -> None:
        if keep_runs < 1:
            raise ValueError(f"keep_runs must be at least 1, not {keep_runs}")
        self.root = root
        self.keep_runs = keep_runs

    def load(self, run: str, start: Version, *, exact: bool = False) -> dict[str, np.ndarray]:
        """Return the newest state that is not newer than `start`, and delete newer ones.

        Newer states belong to rounds that the cloud has discarded: replies that it dropped, or windows after the
        checkpoint that it resumed from.

        Returns
        -------
        dict of str to array
            Empty if there is no such state.

        Raises
        ------
        StateError
            The file is damaged (the message names it), the folder cannot be used, or `run` is not a run id. With
            `exact`, also if there is no state of exactly that version; then nothing is deleted.
        """
        versions = self.versions(run)
        if exact and start > (0, 0) and start not in versions:
            held = ", ".join(f"{w}/{r}" for w, r in versions) or "none"
            raise StateError(
                f"{self._folder(run)} lacks the state of window {start[0]}, round {start[1]}, from which the run "
                f"continues (found: {held}); restore the folder, or start a new run"
            )
        for version in versions:
            if version > start:
                self._remove(run, version)
        usable = [version for version in versions if (0, 0) < version <= start]
        if not usable:
            return {}
        path = self._path(run, usable[-1])
        cached = _cache.take(path)
        return read_tensors(path) if cached is None else cached

    def save(
        self, run: str, version: Version, tensors: Mapping[str, np.ndarray], *, checkpoint_window: int
    ) -> None:
        """Write a version atomically, and delete the versions that no plan can start from any more.

        The remaining versions are this one, the previous one (a straggler whose reply was dropped goes back by one),
        the newest of `checkpoint_window` or earlier (a cloud that resumes goes back to it) and the newest before that
        window (for the case that this checkpoint is damaged).

        Raises
        ------
        StateError
            The folder cannot be written to, or `run` is not a run id.
        """
        if version <= (0, 0) or min(version) < 0:
            raise ValueError(f"version {version} is not after (0, 0)")
        path = self._path(run, version)
        write_tensors(path, tensors)
        # Older versions are loaded only after a rollback, which is rare: then the file is read.
        _cache.drop(path.parent)
        _cache.put(path, tensors)
        versions = self.versions(run)
        older = [other for other in versions if other < version]
        keep = {version, *older[-1:]}
        for window in (checkpoint_window, checkpoint_window - 1):
            keep |= set([other for other in older if other[0] <= window][-1:])
        for other in versions:
            if other not in keep:
                self._remove(run, other)
        for old_run in self.runs()[: -self.keep_runs]:
            self.forget(old_run)

    def versions(self, run: str) -> list[Version]:
        """Return the stored versions of a run, oldest first."""
        folder = self._folder(run)
        try:
            matches = [_FILE.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
        except OSError as error:
            raise StateError(f"cannot read {folder}: {error}; give the folder to this user") from error
        return sorted((int(match[1]), int(match[2])) for match in matches if match)

    def runs(self) -> list[str]:
        """Return the stored runs, the least recently written first."""
        if not self.root.is_dir():
            return []
        folders = [path for path in self.root.iterdir() if path.is_dir() and is_name(path.name)]
        return [path.name for path in sorted(folders, key=lambda path: (path.stat().st_mtime_ns, path.name))]

    def forget(self, run: str) -> None:
        """Delete all states of a run, if there are any."""
        folder = self._folder(run)
        try:
            _cache.drop(folder)
            if folder.is_dir():
                shutil.rmtree(folder)
        except OSError as error:
            raise StateError(f"cannot remove {folder}: {error}; give the folder to this user") from error

    def _folder(self, run: str) -> Path:
        if not is_name(run):
            raise StateError(f"run id {run!r} is refused: it must be {NAME_RULE}")
        return self.root / run

    def _path(self, run: str, version: Version) -> Path:
        return self._folder(run) / f"w{version[0]:06d}-r{version[1]:06d}.safetensors"

    def _remove(self, run: str, version: Version) -> None:
        path = self._path(run, version)
        _cache.drop(path)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StateError(f"cannot remove {path}: {error}; give the folder to this user") from error
