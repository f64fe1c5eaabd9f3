"""Going on with a run: which settings may change, whom it waits for, and what it does with damage and full disks."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.local_grid import LocalNode
from bench.local_tree import LocalClient, LocalTree
from flwr.app import Context, Error, Message
from typer.testing import CliRunner

from espalier.cli import command_line
from espalier.errors import ConfigError, EspalierError, StateError
from espalier.methods.run_config import RunConfig
from espalier.storage.tensor_file import write_tensors
from espalier.wire.sections import SectionId
from espalier_client import device
from espalier_server.records.checkpoint import Checkpoints
from espalier_server.records.events import EventLog, read_events
from espalier_server.records.record import RunRecord
from espalier_server.records.resume import check_changes, locked, resumed_settings
from espalier_server.records.snapshot import Snapshot
from espalier_server.run import TreeRun, check_folder

Flat = dict[str, bool | int | float | str]

SETTINGS: Flat = {
    "method": "fedavg",
    "model": "cnn",
    "rounds": 3,
    "rg": 1,
    "min-edges": 2,
    "min-clients": 2,
    "edge-choice": "fixed",
}
CLIENTS = [LocalClient(f"c{i}", f"digits:{i}/64", (0, 1), {"homes": 2}) for i in range(2)]


def tree_of(folder: Path) -> LocalTree:
    """Return the tree, every process of it started anew."""
    device._device.cache_clear()
    return LocalTree(folder, CLIENTS, 2)


def run(folder: Path, **more: bool | int | float | str) -> TreeRun:
    return tree_of(folder).run("r", SETTINGS | {k.replace("_", "-"): v for k, v in more.items()})


def weights(run: TreeRun) -> dict[tuple[SectionId, str], bytes]:
    assert run.state is not None
    sections = run.state.payload.views()
    return {(s, name): array.tobytes() for s, arrays in sections.items() for name, array in arrays.items()}


# --- settings ------------------------------------------------------------------------------------------


def changed(before: Flat, **now: bool | int | float | str) -> None:
    flat = RunConfig.from_flat(before).to_flat()
    check_changes(flat, RunConfig.from_flat({**flat, **{k.replace("_", "-"): v for k, v in now.items()}}))


def test_harmless_settings_may_change() -> None:
    changed({}, rounds=90, prune_at=20, round_deadline=5.0, keep_checkpoints=9, eval_every=2, min_clients=3)
    changed({"method": "fedavg"}, rounds=90)


@pytest.mark.parametrize(
    ("before", "key", "value"),
    [
        ({}, "learning-rate", 0.5),
        ({}, "seed", 1),
        ({"rounds": 60}, "rounds", 90),  # a third of the rounds is when FedPhD prunes
        ({"method": "power-of-choice", "adaptive-candidates": True}, "rounds", 90),
        ({"reproducible": True}, "min-clients", 3),
        ({"method": "fedavg"}, "reproducible", True),
    ],
)
def test_settings_that_make_another_run_are_refused_by_name(before: Flat, key: str, value: float) -> None:
    named = "prune-at" if not before.get("method") and key == "rounds" else key
    with pytest.raises(ConfigError, match=f"{named}: it was"):
        changed(before, **{key.replace("-", "_"): value})


def test_a_finished_run_says_so_and_goes_on_with_more_rounds(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", rounds=4)
    run(tmp_path)
    folder = tmp_path / "runs" / "r"
    with pytest.raises(ConfigError, match="is finished: 3 of 3 rounds"):
        resumed_settings(folder, {})
    with pytest.raises(ConfigError, match="with more than 3"):
        resumed_settings(folder, {"rounds": 2})
    # The folder may have been moved.
    moved = folder.rename(tmp_path / "moved")
    settings = resumed_settings(moved, {"rounds": 4})
    assert (settings["out"], settings["run-id"], settings["method"]) == (str(moved), "r", "fedavg")
    moved.rename(folder)
    resumed = tree_of(tmp_path).run("r", {k: v for k, v in settings.items() if k != "run-id"})
    assert [w.window for w in resumed.recorder.record.windows] == [1, 2, 3, 4]
    assert resumed.recorder.record.config["rounds"] == 4
    assert weights(resumed) == weights(whole)


def test_pruning_stays_where_it_was_when_rounds_are_added(tmp_path: Path) -> None:
    config = RunConfig.from_flat({"method": "fedphd", "rounds": 60})
    RunRecord(run="r", method="fedphd", status="stopped", config=config.to_flat()).write(tmp_path)
    assert resumed_settings(tmp_path, {"rounds": 90})["prune-at"] == 20


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    runner = CliRunner()
    both = runner.invoke(command_line(), ["run", "--out", "a", "--resume", "b"])
    assert isinstance(both.exception, ConfigError)
    assert "--resume RUN_DIR" in str(both.exception)
    neither = runner.invoke(command_line(), ["run"])
    assert isinstance(neither.exception, ConfigError)
    nothing = runner.invoke(command_line(), ["run", "--resume", str(tmp_path)])
    assert isinstance(nothing.exception, StateError)
    assert "holds no run" in str(nothing.exception)


def test_a_run_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("run", run="r", config=RunConfig.from_flat(SETTINGS).to_flat())
    with locked(tmp_path):
        with pytest.raises(ConfigError, match=f"run r is still running \\(process {os.getpid()}\\)"):
            resumed_settings(tmp_path, {})
        with pytest.raises(StateError, match="is running the run"), locked(tmp_path, timeout=0):
            pass
    assert resumed_settings(tmp_path, {})["rounds"] == 3


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    """What `flwr run` with the same run-id and out meets, too."""
    config = RunConfig.from_flat({**SETTINGS, "run-id": "r"})
    check_folder(config, tmp_path)
    RunRecord(run="r", config=config.to_flat()).write(tmp_path)
    check_folder(config, tmp_path)
    with pytest.raises(EspalierError, match="already holds another run, r"):
        check_folder(config.model_copy(update={"run_id": "s"}), tmp_path)
    with pytest.raises(ConfigError, match="seed: it was 2023 and would be 5"):
        check_folder(config.model_copy(update={"seed": 5}), tmp_path)


# --- damage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "flipped", "meta"])
def test_resume_from_the_checkpoint_before_a_damaged_one(damage: str, tmp_path: Path) -> None:
    settings: Flat = {"method": "scaffold", "reproducible": True}
    whole = run(tmp_path / "whole", **settings)
    run(tmp_path / "broken", **settings)
    folder = tmp_path / "broken" / "runs" / "r"
    newest = folder / "checkpoints" / "window-000003"
    path = newest / ("meta.json" if damage == "meta" else "tensors.safetensors")
    data = bytearray(path.read_bytes())
    data[-9] ^= damage != "truncated"
    path.write_bytes(data[:-5] if damage == "truncated" else data)
    with pytest.raises(
        StateError, match=f"{path.name} is damaged.*remove the folder {newest} to resume after"
    ):
        run(tmp_path / "broken", **settings)
    # The failure cost nothing: the record still knows every window, and what went wrong.
    record = RunRecord.read(folder)
    assert (record.status, len(record.windows)) == ("failed", 3)
    assert "is damaged" in record.reason
    assert read_events(folder / "events.jsonl")[-1]["event"] == "failed"
    shutil.rmtree(newest)
    assert weights(run(tmp_path / "broken", **settings)) == weights(whole)


def test_a_damaged_report_is_rebuilt_from_the_events(tmp_path: Path) -> None:
    first = run(tmp_path)
    (first.out / "report.json").write_text("{")
    again = run(tmp_path, rounds=4)
    assert [w.window for w in again.recorder.record.windows] == [1, 2, 3, 4]
    assert again.recorder.record.status == "finished"


def test_a_checkpoint_is_removed_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"w": np.ones(3)}, {})

    def killed(path: Path, **_: object) -> None:
        if path.exists():
            (path / "meta.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("espalier_server.records.checkpoint.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(2, {"w": np.ones(3)}, {})
    assert Checkpoints(tmp_path, keep=1).windows() == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["window-000002"]


# --- full disks ----------------------------------------------------------------------------------------


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Let no file grow above a size: writes fail in the middle of a file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("window", [1, 2])
def test_a_full_disk_costs_the_checkpoint_that_is_written(window: int, tmp_path: Path) -> None:
    """Also when it would take the place of an older one of the same window."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"w": np.ones(3)}, {"round": 1})
    with (
        small_files(4096),
        pytest.raises(
            StateError, match=r"tensors\.safetensors.*the newest one is that of window 1; free disk space"
        ),
    ):
        checkpoints.save(window, {"w": np.zeros(100_000)}, {"round": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["window-000001"]
    tensors, meta = checkpoints.load(1)
    assert (tensors["w"].tolist(), meta) == ([1, 1, 1], {"round": 1})


def test_a_full_disk_fails_the_run_which_resumes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole")
    count = itertools.count(1)

    def full(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
        if "checkpoints" in str(path) and next(count) == 2:
            with small_files(4096):
                write_tensors(path, tensors)
        else:
            write_tensors(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr("espalier_server.records.checkpoint.write_tensors", full)
        with pytest.raises(StateError, match="the newest one is that of window 1; free disk space"):
            run(tmp_path / "full")
    assert RunRecord.read(tmp_path / "full" / "runs" / "r").status == "failed"
    assert weights(run(tmp_path / "full")) == weights(whole)


def test_an_event_on_a_full_disk_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    real = os.write

    def nearly_full(handle: int, data: bytes) -> int:
        if len(data) > 9:
            return real(handle, data[:9])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("espalier_server.records.events.os.write", nearly_full)
        with pytest.raises(StateError, match=r"events\.jsonl: No space left"):
            log.write("cut short")
    log.write("failed", reason="full")
    assert read_events(tmp_path / "events.jsonl")[-1]["reason"] == "full"


def test_a_client_that_cannot_save_its_state_is_named(tmp_path: Path) -> None:
    tree = tree_of(tmp_path)
    (tmp_path / "clients" / "c1").mkdir(parents=True, exist_ok=True)
    (tmp_path / "clients" / "c1" / "rounds").write_text("a file where a folder is needed")
    done = tree.run("r", SETTINGS)
    assert done.recorder.record.status == "finished"
    faults = done.recorder.record.faults
    assert {(f.tier, f.node, f.kind) for f in faults} == {("edge", "c1", "error")}
    assert all("cannot" in f.detail and "c1/rounds" in f.detail for f in faults)
    assert all(w.participants == ["c0"] for w in done.recorder.record.windows)


def test_an_edge_that_cannot_keep_a_name_says_whose(tmp_path: Path) -> None:
    tree = tree_of(tmp_path)
    run = tree.run("r", SETTINGS)
    assert run.recorder.record.status == "finished"
    shutil.rmtree(tmp_path / "edge-1")
    (tmp_path / "edge-1").write_text("a file where a folder is needed")
    after = tree.run("s", SETTINGS | {"min-clients": 1})
    assert after.recorder.record.status == "finished"


# --- whom a reproducible run waits for -------------------------------------------------------------------


def break_once(node: LocalNode, when: int) -> None:
    """Let a client train and keep its state, and die before its edge has the reply."""
    real, calls = node.app, itertools.count(1)

    def broken(message: Message, context: Context) -> Message:
        reply = real(message, context)
        if message.metadata.message_type == "train" and next(calls) == when:
            return Message(Error(1, "killed"), reply_to=message)
        return reply

    node.app = broken


@pytest.mark.parametrize("method", ["scaffold", "feddyn", "fedproto"])
def test_a_client_killed_before_its_reply_changes_nothing(method: str, tmp_path: Path) -> None:
    """The window is sent again, and the client goes back to the version that it names."""
    settings: Flat = {**SETTINGS, "method": method, "reproducible": True, "rg": 3, "rounds": 6}
    whole = tree_of(tmp_path / "whole").run("r", settings)
    tree = tree_of(tmp_path / "broken")
    # Both edges' links lead to the same device, and it is called at one of them.
    for below in tree.edges:
        break_once(below[1], 5)
    broken = tree.run("r", settings)
    assert [(f.node, f.kind, f.window) for f in broken.recorder.record.faults] == [("c1", "error", 2)]
    assert weights(broken) == weights(whole)


def test_a_lost_client_state_ends_a_reproducible_run(tmp_path: Path) -> None:
    run(tmp_path, reproducible=True)
    shutil.rmtree(tmp_path / "clients" / "c1" / "rounds")
    with pytest.raises(EspalierError, match=r"c1 .*lacks the state of window 3, round 3.*in 3 attempts"):
        run(tmp_path, reproducible=True, rounds=4)
    run_ = tmp_path / "runs" / "r"
    assert Checkpoints(run_ / "checkpoints").latest() == 3


def test_a_reproducible_run_waits_for_its_participants(tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match="2 clients joined, and min-clients=1"):
        run(tmp_path / "more", reproducible=True, min_clients=1)
    # c1 was given two edges and reaches one.
    tree = tree_of(tmp_path / "less")
    tree.edges[0][1].online = False
    with pytest.raises(EspalierError, match="c1 at 1 of its edges"):
        tree.run("r", SETTINGS | {"reproducible": True, "hello-timeout": 0.01})


def test_a_reproducible_run_admits_no_new_client_or_data(tmp_path: Path) -> None:
    run(tmp_path, reproducible=True)
    device._device.cache_clear()
    more = [*CLIENTS, LocalClient("c9", "digits:9/64", (0, 1), {"homes": 2})]
    done = LocalTree(tmp_path, more, 2).run("r", SETTINGS | {"reproducible": True, "rounds": 4})
    assert sorted({p for w in done.recorder.record.windows for p in w.participants}) == ["c0", "c1"]
    assert any(f.node == "c9" and "next run" in f.detail for f in done.recorder.record.faults)
    other = [CLIENTS[0], LocalClient("c1", "digits:5/64", (0, 1), {"homes": 2})]
    device._device.cache_clear()
    changes: dict[str, Any] = {"reproducible": True, "rounds": 5, "hello-timeout": 0.01}
    with pytest.raises(EspalierError, match=r"c1 at edge-1.* did not join"):
        LocalTree(tmp_path, other, 2).run("r", SETTINGS | changes)
    assert "restore its data" in json.dumps([f.detail for f in _faults(tmp_path)])


def _faults(folder: Path) -> list[Any]:
    return RunRecord.read(folder / "runs" / "r").faults


def test_everything_in_a_snapshot_comes_back(tmp_path: Path) -> None:
    done = run(tmp_path, ema_decay=0.5, selection="rpow-d", reproducible=True)
    checkpoints = Checkpoints(done.out / "checkpoints")
    found = Snapshot.unpack(*checkpoints.load(3))
    assert done.state is not None
    kept = Snapshot(done.state, found.reached, done.tree.frozen_members).pack()
    again = found.pack()
    assert again[1] == kept[1]
    assert {n: a.tobytes() for n, a in again[0].items()} == {n: a.tobytes() for n, a in kept[0].items()}
    assert found.reached == {"c0": (3, 3), "c1": (3, 3)}
    [(section, losses)] = found.state.memory.items()
    assert section == ("selection", "loss", "")
    assert losses.keys() == {"c0", "c1"}
