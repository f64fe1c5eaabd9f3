"""JSON as the rest of the world reads it: no NaN, no numpy, and files that are written whole."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from espalier.errors import StateError


def plain(value: Any) -> Any:
    """Return `value` in JSON's own types; NaN and infinities become None, arrays lists, paths text.

    Raises
    ------
    TypeError
        The value holds something else.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy arrays and scalars, without importing numpy
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def write_text(path: Path, text: str, mode: int | None = None) -> None:
    """Write a file by way of a temporary one and a rename.

    Parameters
    ----------
    path : Path
        The file; its folder is made.
    text : str
        Its content.
    mode : int, optional
        Its rights, e.g. 0o600; by default those of any new file.

    Raises
    ------
    StateError
        The folder cannot be written to.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StateError(f"cannot write {path}: {error}; see to space and rights there") from error
