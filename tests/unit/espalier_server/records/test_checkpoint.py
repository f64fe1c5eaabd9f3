"""Checkpoints: written, read, retained, and damage is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from espalier.errors import StateError
from espalier_server.records.checkpoint import Checkpoints
from tests.support.stored_state import tensors, value_of


def test_checkpoints_come_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest() is None
    checkpoints.save(2, tensors(2), {"round": 10, "score": float("nan"), "mu": np.float64(0.5)})
    state, meta = Checkpoints(tmp_path / "checkpoints").load(2)
    assert value_of(state) == 2
    assert meta == {"round": 10, "score": None, "mu": 0.5}


def test_newest_and_best_checkpoints_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for window, score in enumerate([5.0, 1.0, 3.0, 4.0, None], start=1):
        checkpoints.save(window, tensors(window), {"score": score})
    assert checkpoints.windows() == [2, 4, 5]
    assert checkpoints.latest() == 5


def test_a_window_may_be_saved_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tensors(1), {})
    checkpoints.save(1, tensors(7), {})
    assert value_of(checkpoints.load(1)[0]) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["window-000001"]


@pytest.mark.parametrize(("name", "content"), [("meta.json", b"{"), ("tensors.safetensors", b"\0" * 40)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_stays(
    tmp_path: Path, name: str, content: bytes
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for window in (1, 2):
        checkpoints.save(window, tensors(window), {"round": window})
    (tmp_path / "window-000002" / name).write_bytes(content)
    with pytest.raises(StateError, match=f"{name} is damaged"):
        checkpoints.load(2)
    assert value_of(checkpoints.load(1)[0]) == 1


def test_altered_meta_is_noticed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tensors(1), {"round": 5})
    path = tmp_path / "window-000001" / "meta.json"
    path.write_text(path.read_text().replace('"round": 5', '"round": 6'))
    with pytest.raises(StateError, match="checksum"):
        checkpoints.load(1)


def test_a_crash_while_saving_leaves_the_old_checkpoints(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(1, tensors(1), {})
    # Between the two renames of a second save of window 1, and in the middle of writing window 2.
    (tmp_path / "window-000001").rename(tmp_path / ".old-window-000001")
    (tmp_path / ".partial-window-000002").mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.windows() == [1]
    assert value_of(checkpoints.load(1)[0]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["window-000001"]
