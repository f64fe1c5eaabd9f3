"""What a run keeps on disk: client state, checkpoints, events, ledger and record."""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.errors import StateError
from espalier.storage.tensor_file import read_tensors, write_tensors
from espalier.wire.traffic import CLIENT_EDGE, EDGE_CLOUD, Ledger
from espalier_client.state import StateStore, Version
from espalier_server.records.checkpoint import Checkpoints
from espalier_server.records.events import EventLog, follow, read_events
from espalier_server.records.record import Participation, RoundEntry, RunRecord, WindowEntry

needs_rights = pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")


def tensors(value: float) -> dict[str, np.ndarray]:
    return {
        "adam.step": np.array(int(value), dtype=np.int64),
        "adam.m": np.full((2, 3), value, dtype=np.float32),
    }


def value_of(state: dict[str, np.ndarray]) -> float:
    return float(state["adam.m"][0, 0]) if state else 0.0


def flip_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


# --- tensors -------------------------------------------------------------------------------------


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


# --- state ---------------------------------------------------------------------------------------


def test_nothing_kept_is_an_empty_state(tmp_path: Path) -> None:
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


def test_kept_are_newest_one_before_and_the_checkpointed(tmp_path: Path) -> None:
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
def test_run_ids_play_no_path_tricks(tmp_path: Path, run: str) -> None:
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


# --- checkpoints ---------------------------------------------------------------------------------


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


# --- events --------------------------------------------------------------------------------------


def test_events_are_followed_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    stop, seen = threading.Event(), []

    def read() -> None:
        for event in follow(path, stop):
            seen.append(event)
            if event["event"] == "finished":
                stop.set()

    reader = threading.Thread(target=read)
    reader.start()
    log = EventLog(path)
    log.write("window-start", window=1, rounds=[{"round": 1}])
    log.write("window-end", window=1, losses={1: math.nan}, mu={"edge-1": np.float32(0.5)})
    log.write("finished")
    reader.join(timeout=10)
    assert not reader.is_alive()
    assert [event["event"] for event in seen] == ["window-start", "window-end", "finished"]
    assert seen[1]["losses"] == {"1": None}
    assert seen[1]["mu"] == {"edge-1": 0.5}
    log.close()


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "run"}\n{"event": "win')
    log = EventLog(path)
    log.write("checkpoint", window=1)
    log.close()
    assert [event["event"] for event in read_events(path)] == ["run", "checkpoint"]


def test_a_resumed_run_can_be_followed_from_its_resumption(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.write("failed", reason="power cut")
    start = path.stat().st_size
    log.write("run", run="r")
    done = threading.Event()
    done.set()
    assert [event["event"] for event in follow(path, done, offset=start)] == ["run"]
    log.close()


# --- ledger and record ---------------------------------------------------------------------------


def test_ledger_adds_up() -> None:
    ledger, other = Ledger(), Ledger()
    ledger.add(CLIENT_EDGE, up_bytes=3)
    other.add(CLIENT_EDGE, up_bytes=4, down_bytes=5, messages=2)
    other.add(EDGE_CLOUD, down_bytes=1)
    ledger.merge(other)
    ledger.merge({"edge-cloud": {"up_bytes": 10, "down_bytes": 0, "messages": 0}})
    assert ledger.as_dict() == {
        "client-edge": {"up_bytes": 7, "down_bytes": 5, "messages": 3},
        "edge-cloud": {"up_bytes": 10, "down_bytes": 1, "messages": 1},
    }
    with pytest.raises(ValueError, match="negative"):
        ledger.add(CLIENT_EDGE, up_bytes=-1)


def test_ledger_counts_every_thread() -> None:
    ledger = Ledger()

    def add() -> None:
        for _ in range(1000):
            ledger.add(CLIENT_EDGE, up_bytes=1)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.as_dict()["client-edge"] == {"up_bytes": 4000, "down_bytes": 0, "messages": 4000}


def test_record_comes_back_and_holds_what_the_readers_expect(tmp_path: Path) -> None:
    a, b = Participation(client="a", edge="e"), Participation(client="b", edge="e")
    rounds = [
        RoundEntry(round=1, loss=0.5, participants=[b, a]),
        RoundEntry(round=2, loss=math.nan, participants=[a]),
    ]
    window = WindowEntry(window=1, rounds=rounds, rho={"e": 1.0}, mu={"e": 0.7})
    record = RunRecord(method="fedphd", windows=[window])
    record.write(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["windows"][0]["losses"] == [0.5, None]
    assert content["windows"][0]["participants"] == ["a", "b"]
    assert content["windows"][0]["rho"] == {"e": 1.0}
    assert set(content["links"]["client-edge"]) == {"up_bytes", "down_bytes", "messages"}
    assert set(content["model"]) >= {"params", "macs", "params_dense", "macs_dense"}
    assert RunRecord.read(tmp_path).as_dict() == content


@pytest.mark.parametrize("content", [None, "{", '{"windows": 3}'])
def test_what_is_no_record(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(StateError, match=r"report\.json"):
        RunRecord.read(tmp_path)


# --- a state in memory beside its file -----------------------------------------------------------


@pytest.fixture
def read_files(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Note which files are read, and start with nothing in memory."""
    from espalier_client import state

    found: list[Path] = []

    def read(path: Path) -> dict[str, np.ndarray]:
        found.append(path)
        return read_tensors(path)

    monkeypatch.setattr(state, "_newest", state._Newest(1000))
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
    monkeypatch.setattr(state, "_newest", state._Newest(1000))  # another process
    assert value_of(StateStore(tmp_path).load("run", (1, 1))) == 7
    assert len(read_files) == 1


def test_who_goes_back_gets_the_older_state(tmp_path: Path, read_files: list[Path]) -> None:
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
