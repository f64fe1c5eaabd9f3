"""The client process by itself: what it holds while idle, and what it says when it cannot start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from bench.stock import SuperLink, wait_until
from flwr.app import ConfigRecord

from espalier.data.spec import open_data
from espalier.flower.node_state import load_key
from espalier.security.name_registry import NameRegistry
from espalier_edge.fleet.server import InlineFleet
from espalier_edge.roster import Roster
from tests.support.tree import LiveTree, espalier, live_tree, process_environment, start_client

MB = 1 << 20


def bare_import_bytes(folder: Path) -> int:
    """Return the resident memory of a process that imported torch and diffusers and nothing else."""
    code = "import psutil, torch, diffusers; print(psutil.Process().memory_info().rss)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=process_environment(folder),
        capture_output=True,
        text=True,
        check=True,
    )
    return int(found.stdout)


def test_idle_client_is_one_small_process(tmp_path: Path) -> None:
    """Connected and known to its edge: within 120 MB of a bare `import torch, diffusers`."""
    fleet = InlineFleet("127.0.0.1:0")
    fleet.start()
    try:
        address = f"127.0.0.1:{fleet.port}"
        tree = LiveTree(SuperLink(address, "", 0, tmp_path / "none"), tmp_path, {"e": address})
        with start_client(tree, "cam-7", "digits:0/4", ["e"]) as pid:
            grid = fleet.open_run()
            roster = Roster(fleet, NameRegistry(tmp_path / "names.json"))
            wait_until(fleet.nodes, 60, "the client")
            roster.refresh(grid, ConfigRecord({"run": "r", "histogram-epsilon": 0.0}), 30)
            assert list(roster.clients()) == ["cam-7"]
            process = psutil.Process(pid)
            wait_until(lambda: not process.children(recursive=True), 30, "the end of its start-up helpers")
            held = process.memory_info().rss
            assert held <= bare_import_bytes(tmp_path) + 120 * MB
    finally:
        fleet.stop()


def test_replicas_take_part_as_many_clients(tmp_path: Path) -> None:
    """Four clients in one process: each known by its own name, key and share, and all of them train."""
    with live_tree(tmp_path, edges=1, clients=0) as tree:
        options = ["--replicas", "4"]
        with start_client(tree, "r", "digits:8/16", list(tree.edges), *options):
            run = tree.run(
                "replicas", method="fedavg", model="cnn", rounds=2, rg=1, min_edges=1, min_clients=4
            )
    record = run.recorder.record
    assert record.faults == []
    names = [f"r-{i:03d}" for i in range(4)]
    for window in record.windows:
        assert sorted(p.client for p in window.rounds[0].participants) == names
        assert all(p.signed for p in window.rounds[0].participants)
    keys = [load_key(tmp_path / "r" / name / "node.key") for name in names]
    assert len({key.private_numbers().private_value for key in keys}) == 4
    shares = [len(open_data(f"digits:{8 + i}/16")) for i in range(4)]
    assert [record.clients[name].samples for name in names] == shares


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "digits:9/4"], "numbered 0 to 3"),
        (["--data", "digts"], "digits"),
        (["--data", "./no-such-folder"], "no-such-folder"),
        (["--data", "digits", "--edge", "nonsense"], "nonsense"),
        (["--data", "digits", "--edge", "192.0.2.7:9093"], "--insecure"),
        (["--data", "digits", "--replicas", "2", "--key", "k"], "--replicas excludes"),
        (["--data", "digits:1/4", "--replicas", "4"], "need 5 shares, not 4"),
        (["--app", "no_such_module:app"], "no_such_module"),
        (["--app", "json:dumps"], "not a flwr ClientApp"),
    ],
)
def test_a_client_that_cannot_start_says_why(tmp_path: Path, arguments: list[str], words: str) -> None:
    """One clear line on stderr and an exit status, no traceback."""
    if "--edge" not in arguments:
        arguments = [*arguments, "--edge", "127.0.0.1:9"]
    command = espalier("client", "--name", "cam-7", "--state", str(tmp_path / "s"), *arguments)
    done = subprocess.run(
        command, env=process_environment(tmp_path), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode not in (0, 1), done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_empty_folder_and_folder_without_images(tmp_path: Path) -> None:
    """Each gets its own line."""
    empty = tmp_path / "empty"
    empty.mkdir()
    texts = tmp_path / "texts" / "cats"
    texts.mkdir(parents=True)
    (texts / "notes.txt").write_text("no image")
    for folder in (empty, texts.parent):
        command = espalier("client", "--name", "c", "--state", str(tmp_path / "s"), "--edge", "127.0.0.1:9")
        done = subprocess.run(
            [*command, "--data", str(folder)],
            env=process_environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 3
        assert str(folder) in done.stderr
        assert "Traceback" not in done.stderr
