"""Safetensors files: they come back as they were, and damage is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from espalier.errors import StateError
from espalier.storage.tensor_file import read_tensors, write_tensors


def tensors(value: float) -> dict[str, np.ndarray]:
    return {
        "adam.step": np.array(int(value), dtype=np.int64),
        "adam.m": np.full((2, 3), value, dtype=np.float32),
    }


def flip_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray] = {
        "scalar": np.array(3, dtype=np.int64),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "flags": np.array([True, False]),
    }
    write_tensors(tmp_path / "a.safetensors", arrays)
    back = read_tensors(tmp_path / "a.safetensors")
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        np.testing.assert_array_equal(back[name], array)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("offset", [0, 20, -1])
def test_a_flipped_byte_is_noticed(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors(1))
    flip_byte(path, offset)
    with pytest.raises(StateError, match=r"a\.safetensors is damaged"):
        read_tensors(path)
