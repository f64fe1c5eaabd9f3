"""A client's state between rounds: versions, rollback, limits, and the newest in memory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.errors import StateError
from espalier.storage.tensor_file import read_tensors, write_tensors
from espalier_client.state import StateStore, Version
from tests.support.stored_state import tensors, value_of

needs_rights = pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")


def test_no_saved_version_is_an_empty_state(tmp_path: Path) -> None:
    assert StateStore(tmp_path / "absent").load("run", (3, 9)) == {}


def test_a_client_rolls_back_to_what_the_plan_names(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    for round_ in (1, 2):
        store.save("run", (1, round_), tensors(round_), checkpoint_window=0)
    # The reply of round 2 came too late: round 3 starts from version (1, 1).
    assert value_of(store.load("run", (1, 1))) == 1
    assert store.versions("run") == [(1, 1)]
    # A client that sat out goes on from the newest it has.
    assert value_of(store.load("run", (4, 17))) == 1
    # Before anything was trained.
    assert store.load("run", (0, 0)) == {}
    assert store.versions("run") == []


def test_which_versions_are_retained(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    for window in (1, 2, 3):
        for round_ in (1, 2, 3):
            store.save("run", (window, 3 * (window - 1) + round_), tensors(1), checkpoint_window=window - 1)
    assert store.versions("run") == [(1, 3), (2, 6), (3, 8), (3, 9)]
    # The cloud comes back from its checkpoint of window 2; then that one is damaged, too.
    assert store.load("run", (2, 6)) != {}
    assert store.versions("run") == [(1, 3), (2, 6)]
    assert store.load("run", (1, 3)) != {}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_version_a_cloud_can_ask_for_is_there(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Model: a cloud that drops replies, checkpoints every window and may go back to its checkpoint."""
    store = StateStore(tmp_path_factory.mktemp("state"))
    accepted: list[Version] = []  # the versions the cloud knows, oldest first
    window, round_, checkpoint = 1, 0, 0
    for action in data.draw(
        st.lists(st.sampled_from(["train", "drop", "sit out", "window", "crash"]), max_size=25)
    ):
        if action == "window":
            window, checkpoint = window + 1, window
        elif action == "crash":
            accepted = [version for version in accepted if version[0] <= checkpoint]
            window = checkpoint + 1
        elif action == "sit out":
            round_ += 1
        else:
            start = accepted[-1] if accepted else (0, 0)
            assert value_of(store.load("run", start)) == start[1]
            round_ += 1
            # A checkpoint is known to the client from the window after the one that made it.
            store.save("run", (window, round_), tensors(round_), checkpoint_window=checkpoint)
            if action == "train":
                accepted.append((window, round_))


def test_old_runs_are_forgotten(tmp_path: Path) -> None:
    store = StateStore(tmp_path, keep_runs=2)
    for place, run in enumerate(["a", "b", "c"]):
        store.save(run, (1, 1), tensors(1), checkpoint_window=0)
        os.utime(tmp_path / run, ns=(place * 10**9, place * 10**9))
    store.save("d", (1, 1), tensors(1), checkpoint_window=0)
    assert store.runs() == ["c", "d"]
    store.forget("c")
    assert store.runs() == ["d"]


@pytest.mark.parametrize("run", ["", "..", "../x", "a/b", "a" * 65, "ü", "/etc"])
def test_run_ids_that_are_paths_are_refused(tmp_path: Path, run: str) -> None:
    store = StateStore(tmp_path / "state")
    with pytest.raises(StateError, match="run id"):
        store.save(run, (1, 1), tensors(1), checkpoint_window=0)
    with pytest.raises(StateError, match="run id"):
        store.load(run, (1, 1))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.save("run", (1, 1), tensors(1), checkpoint_window=0)
    path = tmp_path / "run" / "w000001-r000001.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(StateError, match=r"w000001-r000001\.safetensors is damaged"):
        store.load("run", (1, 1))


@needs_rights
def test_an_unwritable_state_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StateError, match="cannot write"):
        StateStore(tmp_path / "state").save("run", (1, 1), tensors(1), checkpoint_window=0)


def test_a_state_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(StateError, match="cannot write"):
        StateStore(tmp_path / "state").save("run", (1, 1), tensors(1), checkpoint_window=0)


@pytest.fixture
def read_files(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Note which files are read, and start with nothing in memory."""
    from espalier_client import state

    found: list[Path] = []

    def read(path: Path) -> dict[str, np.ndarray]:
        found.append(path)
        return read_tensors(path)

    monkeypatch.setattr(state, "_cache", state._StateCache(1000))
    monkeypatch.setattr(state, "read_tensors", read)
    return found


def test_the_newest_state_is_not_read_again(tmp_path: Path, read_files: list[Path]) -> None:
    store = StateStore(tmp_path)
    kept = {"m": np.arange(6.0).reshape(2, 3).T, "n": np.array(3), "half": np.ones(2, np.float16)}
    store.save("run", (1, 1), kept, checkpoint_window=0)
    held = store.load("run", (1, 1))
    assert read_files == []
    # What the file would have given, and the taker's own: the next one to ask gets the file's.
    held["more"] = np.zeros(1)
    again = store.load("run", (1, 1))
    assert len(read_files) == 1
    assert set(again) == set(kept)
    for name, array in again.items():
        assert array.dtype == held[name].dtype
        assert array.shape == held[name].shape
        assert array.strides == held[name].strides
        assert np.array_equal(array, held[name])


def test_a_kill_loses_nothing(
    tmp_path: Path, read_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from espalier_client import state

    StateStore(tmp_path).save("run", (1, 1), tensors(7), checkpoint_window=0)
    monkeypatch.setattr(state, "_cache", state._StateCache(1000))  # another process
    assert value_of(StateStore(tmp_path).load("run", (1, 1))) == 7
    assert len(read_files) == 1


def test_a_rollback_loads_the_older_state(tmp_path: Path, read_files: list[Path]) -> None:
    store = StateStore(tmp_path)
    store.save("run", (1, 1), tensors(1), checkpoint_window=0)
    store.save("run", (1, 2), tensors(2), checkpoint_window=0)
    assert value_of(store.load("run", (1, 1))) == 1
    assert store.load("run", (0, 0)) == {}
    store.save("run", (1, 2), tensors(3), checkpoint_window=0)
    assert value_of(store.load("run", (1, 2))) == 3
    assert len(read_files) == 1


def test_a_file_that_another_wrote_or_that_is_gone_counts(tmp_path: Path, read_files: list[Path]) -> None:
    store = StateStore(tmp_path)
    store.save("run", (1, 1), tensors(1), checkpoint_window=0)
    write_tensors(tmp_path / "run" / "w000001-r000001.safetensors", tensors(5))
    assert value_of(store.load("run", (1, 1))) == 5
    store.save("run", (1, 1), tensors(1), checkpoint_window=0)
    store.forget("run")
    assert store.load("run", (1, 1)) == {}


def test_memory_for_states_has_a_limit(tmp_path: Path, read_files: list[Path]) -> None:
    small, large = {"m": np.zeros(50)}, {"m": np.zeros(200)}  # of 1000 bytes
    stores = [StateStore(tmp_path / str(i)) for i in range(3)]
    for store in stores:
        store.save("run", (1, 1), small, checkpoint_window=0)
    for store in stores:
        store.load("run", (1, 1))
    assert [path.parts[-3] for path in read_files] == ["0"]
    stores[0].save("run", (1, 2), large, checkpoint_window=0)
    assert stores[0].load("run", (1, 2))["m"].shape == (200,)
    assert len(read_files) == 2
