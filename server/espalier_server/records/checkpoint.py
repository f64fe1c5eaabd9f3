"""The checkpoints of a run: one folder per window, written atomically; the newest ones and the best one remain."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from espalier.errors import StateError
from espalier.storage.atomic import sync_folder
from espalier.storage.json_file import jsonable, write_json
from espalier.storage.tensor_file import read_tensors, write_tensors

_FOLDER = re.compile(r"window-(\d+)")
_TENSORS, _META = "tensors.safetensors", "meta.json"


class Checkpoints:
    """Checkpoints ``FOLDER/window-N/{tensors.safetensors, meta.json}``.

    Parameters
    ----------
    folder : Path
        Created at the first write.
    keep : int
        Number of newest checkpoints to retain. The best one is retained, too: the one with the lowest
        ``meta["score"]`` (a number; absent or None means unscored).

    Raises
    ------
    ValueError
        `keep` is less than 1.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.folder = folder
        self.keep = keep
        self._repair()

    def save(self, window: int, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Write the checkpoint of a window, then remove those that are no longer retained.

        Parameters
        ----------
        window : int
            The window after which the checkpoint is written.
        tensors : mapping of str to array
            The global state by name, arrays of any shape.
        meta : mapping
            Values that JSON can represent; the lowest ``"score"`` marks the best checkpoint.

        Raises
        ------
        StateError
            The folder cannot be written to; earlier checkpoints are untouched.
        """
        target, partial, replaced = (
            self._path(window),
            self._hidden("partial", window),
            self._hidden("old", window),
        )
        content = jsonable(dict(meta))
        document = {"window": window, "meta": content, "sha256": _digest(content)}
        try:
            shutil.rmtree(partial, ignore_errors=True)
            write_tensors(partial / _TENSORS, tensors)
            write_json(partial / _META, document)
            sync_folder(partial)
            if target.exists():
                target.replace(replaced)
            partial.replace(target)
            sync_folder(self.folder)
        except (OSError, StateError) as error:
            # Remove the incomplete checkpoint, which takes disk space, and restore the one that it was to replace.
            shutil.rmtree(partial, ignore_errors=True)
            if replaced.exists() and not target.exists():
                replaced.replace(target)
            older = self.latest()
            newest = (
                "there is no earlier one" if older is None else f"the newest one is that of window {older}"
            )
            raise StateError(
                f"cannot write checkpoint {target} ({error}); {newest}; free disk space or correct the permissions, "
                "then resume the run"
            ) from error
        shutil.rmtree(replaced, ignore_errors=True)
        self._remove_old()

    def windows(self) -> list[int]:
        """Return the windows that have a checkpoint, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = (_FOLDER.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> int | None:
        """Return the newest window that has a checkpoint, or None."""
        windows = self.windows()
        return windows[-1] if windows else None

    def load(self, window: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the tensors and the meta of a checkpoint.

        Raises
        ------
        StateError
            The checkpoint is absent or damaged; the message names the file, and nothing is removed.
        """
        try:
            tensors = read_tensors(self._path(window) / _TENSORS)
        except StateError as error:
            raise StateError(f"{str(error).partition('; ')[0]}; {self._advice(window)}") from error
        return tensors, self._meta(window)

    def _meta(self, window: int) -> dict[str, Any]:
        path = self._path(window) / _META
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            intact = document["sha256"] == _digest(document["meta"]) and document["window"] == window
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StateError(f"{path} is damaged ({error!r}); {self._advice(window)}") from error
        if not intact:
            raise StateError(f"{path} is damaged (its checksum differs); {self._advice(window)}")
        meta: dict[str, Any] = document["meta"]
        return meta

    def _advice(self, window: int) -> str:
        older = [other for other in self.windows() if other < window]
        if not older:
            return "there is no older checkpoint; start a new run"
        return f"remove the folder {self._path(window)} to resume after window {older[-1]}"

    def _remove_old(self) -> None:
        windows = self.windows()
        keep = set(windows[-self.keep :])
        scored = {}
        for window in windows:
            # A damaged checkpoint cannot be the best one; it is removed when it is no longer among the newest.
            with contextlib.suppress(StateError):
                score = self._meta(window).get("score")
                if isinstance(score, int | float):
                    scored[window] = score
        if scored:
            keep.add(min(scored, key=lambda window: (scored[window], -window)))
        for window in windows:
            if window not in keep:
                # Rename it first, so that a process killed during the removal does not leave an incomplete checkpoint.
                gone = self._hidden("gone", window)
                with contextlib.suppress(OSError):
                    self._path(window).replace(gone)
                shutil.rmtree(gone, ignore_errors=True)

    def _repair(self) -> None:
        """Clean up after a crash inside `save`: restore a replaced checkpoint, remove incomplete ones."""
        if not self.folder.is_dir():
            return
        for path in self.folder.glob(".old-*"):
            target = self.folder / path.name.removeprefix(".old-")
            if target.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.replace(target)
        for path in [*self.folder.glob(".partial-*"), *self.folder.glob(".gone-*")]:
            shutil.rmtree(path, ignore_errors=True)

    def _path(self, window: int) -> Path:
        return self.folder / f"window-{window:06d}"

    def _hidden(self, kind: str, window: int) -> Path:
        return self.folder / f".{kind}-window-{window:06d}"


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
