"""JSON without NaN and NumPy types."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from espalier.storage.json_file import jsonable, write_json


def test_values_become_json_types(tmp_path: Path) -> None:
    value = {
        1: np.float32(0.5),
        "rows": np.arange(4).reshape(2, 2),
        "bad": [math.nan, -math.inf, np.array([np.nan, 1.0])],
        "path": tmp_path,
        "set": {True},
        "none": None,
    }
    write_json(tmp_path / "x.json", jsonable(value))
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "1": 0.5,
        "rows": [[0, 1], [2, 3]],
        "bad": [None, None, [None, 1.0]],
        "path": str(tmp_path),
        "set": [True],
        "none": None,
    }


def test_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        jsonable({"x": object()})
