"""State a client or edge keeps between rounds, versioned so that it can follow a cloud that goes back."""

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
"""(window, round); (0, 0) is the state before anything was trained."""

#: Bytes of states, over all stores of a process, that stay in memory beside their files.
IN_MEMORY = 64 << 20

_FILE = re.compile(r"w(\d+)-r(\d+)\.safetensors")


class _Newest:
    """States just written, each for the one that loads it next: a client goes on from what its last round left.

    Whoever takes a state has it alone, and its file is what is left. So nothing is shared between two rounds, and a
    round that fails goes back to the file.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: dict[Path, tuple[tuple[int, ...], dict[str, np.ndarray]]] = {}
        self._lock = threading.Lock()

    def put(self, path: Path, tensors: Mapping[str, np.ndarray]) -> None:
        """Hold what was written to a file, and let go of the oldest where it is too much."""
        with self._lock:
            self._held.pop(path, None)
            # As a file would give them back, or a sum might add up in another order.
            whole = {n: np.ascontiguousarray(a).reshape(np.shape(a)) for n, a in tensors.items()}
            self._held[path] = (_mark(path), whole)
            while sum(_size(held) for _, held in self._held.values()) > self._limit:
                self._held.pop(next(iter(self._held)))

    def take(self, path: Path) -> dict[str, np.ndarray] | None:
        """Return what was written to a file; None where it is not held, or somebody else wrote the file since."""
        with self._lock:
            mark, tensors = self._held.pop(path, ((), {}))
        return tensors if mark and mark == _mark(path) else None

    def drop(self, folder: Path) -> None:
        """Let go of what belongs to a path, or to a folder."""
        with self._lock:
            for path in [p for p in self._held if p == folder or p.parent == folder]:
                del self._held[path]


def _mark(path: Path) -> tuple[int, ...]:
    """Return what changes when a file is written or replaced; () where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _size(tensors: Mapping[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in tensors.values())


_newest = _Newest(IN_MEMORY)


class StateStore:
    """Named arrays per run and version, as files ``ROOT/RUN/wWINDOW-rROUND.safetensors``.

    Parameters
    ----------
    root : Path
        Folder of the store; made when first written to.
    keep_runs : int
        Runs kept; saving a further one forgets the run that was written to longest ago.
    """

    def __init__(self, root: Path, *, keep_runs: int = 4) -> None:
        if keep_runs < 1:
            raise ValueError(f"keep_runs must be at least 1, not {keep_runs}")
        self.root = root
        self.keep_runs = keep_runs

    def load(self, run: str, start: Version, *, exact: bool = False) -> dict[str, np.ndarray]:
        """Return the newest state that is not newer than `start`, and forget newer ones.

        What is newer belongs to rounds that the cloud no longer knows: replies it dropped, or windows after
        the checkpoint it resumed from.

        Returns
        -------
        dict of str to array
            Empty when there is no such state.

        Raises
        ------
        StateError
            The file is damaged (it is named), the folder cannot be used, or `run` is no run id. With `exact`,
            also if the state of just that version is not there; then nothing is forgotten.
        """
        versions = self.versions(run)
        if exact and start > (0, 0) and start not in versions:
            held = ", ".join(f"{w}/{r}" for w, r in versions) or "none"
            raise StateError(
                f"{self._folder(run)} lacks the state of window {start[0]}, round {start[1]}, which the run goes "
                f"on from (there: {held}); bring the folder back, or start a new run"
            )
        for version in versions:
            if version > start:
                self._remove(run, version)
        usable = [version for version in versions if (0, 0) < version <= start]
        if not usable:
            return {}
        path = self._path(run, usable[-1])
        newest = _newest.take(path)
        return read_tensors(path) if newest is None else newest

    def save(
        self, run: str, version: Version, tensors: Mapping[str, np.ndarray], *, checkpoint_window: int
    ) -> None:
        """Write a version, whole or not at all, and remove those nobody can ask for any more.

        Kept are this version, the one before it (a straggler whose reply was dropped goes back by one), the
        newest one of `checkpoint_window` or earlier (a cloud that resumes goes back to it) and the newest one
        before that window (to which it goes back if that checkpoint turns out to be damaged).

        Raises
        ------
        StateError
            The folder cannot be written to, or `run` is no run id.
        """
        if version <= (0, 0) or min(version) < 0:
            raise ValueError(f"version {version} is not after (0, 0)")
        path = self._path(run, version)
        write_tensors(path, tensors)
        # Nobody goes on from an older version but who is told to go back, and then the file will do.
        _newest.drop(path.parent)
        _newest.put(path, tensors)
        versions = self.versions(run)
        older = [other for other in versions if other < version]
        keep = {version, *older[-1:]}
        for window in (checkpoint_window, checkpoint_window - 1):
            keep |= set([other for other in older if other[0] <= window][-1:])
        for other in versions:
            if other not in keep:
                self._remove(run, other)
        for forgotten in self.runs()[: -self.keep_runs]:
            self.forget(forgotten)

    def versions(self, run: str) -> list[Version]:
        """Return the versions held of `run`, oldest first."""
        folder = self._folder(run)
        try:
            matches = [_FILE.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
        except OSError as error:
            raise StateError(f"cannot read {folder}: {error}; give the folder to this user") from error
        return sorted((int(match[1]), int(match[2])) for match in matches if match)

    def runs(self) -> list[str]:
        """Return the runs held, the one written to longest ago first."""
        if not self.root.is_dir():
            return []
        folders = [path for path in self.root.iterdir() if path.is_dir() and is_name(path.name)]
        return [path.name for path in sorted(folders, key=lambda path: (path.stat().st_mtime_ns, path.name))]

    def forget(self, run: str) -> None:
        """Remove everything of a run; nothing happens when there is nothing."""
        folder = self._folder(run)
        try:
            _newest.drop(folder)
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
        _newest.drop(path)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StateError(f"cannot remove {path}: {error}; give the folder to this user") from error
