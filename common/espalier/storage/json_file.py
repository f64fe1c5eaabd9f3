"""Strict JSON: values without NaN or NumPy types, and files that are replaced atomically."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from espalier.storage.atomic import write_text


def jsonable(value: Any) -> Any:
    """Convert `value` to JSON's own types: NaN and infinities become None, arrays lists, paths text.

    Raises
    ------
    TypeError
        The value contains another type.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy arrays and scalars, without importing numpy
        return jsonable(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def write_json(path: Path, value: Any, mode: int | None = None) -> None:
    """Replace a file's content with `value` as indented JSON; see :func:`espalier.storage.atomic.replacing`.

    Parameters
    ----------
    path : Path
        The file; its folder is created.
    value : any
        What :func:`json.dumps` takes; see :func:`jsonable`.
    mode : int, optional
        Permissions, e.g. ``0o600``; by default those of any new file.

    Raises
    ------
    StateError
        The file cannot be written.
    """
    write_text(path, json.dumps(value, indent=1) + "\n", mode)
