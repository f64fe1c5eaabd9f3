"""The demonstration: `espalier demo` to its end (as its bench runs it), and ended by Ctrl-C in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from bench.stock import wait_until

from tests.support.tree import espalier, process_environment


def test_the_bench_of_the_demonstration(capsys: pytest.CaptureFixture[str]) -> None:
    """Two whole demonstrations in tiny; the pruned one is smaller and sends less."""
    from bench.demo import ABOUT, measure
    from bench.report import run

    assert run("demo", measure, ABOUT, ["--tiny", "--json"]) == 0
    rows = {row["model"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["pruned 0.2"]["params"] < 0.75 * rows["dense"]["params"]
    assert rows["pruned 0.2"]["client_edge_mb"] < rows["dense"]["client_edge_mb"]
    assert rows["dense"]["frechet"] > rows["dense"]["real"] > 0


def hear_ctrl_c() -> None:
    """Undo what a shell does to a job in the background: it has it ignore Ctrl-C, and its children with it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_stops_every_process_cleanly(tmp_path: Path) -> None:
    """In the middle of a window: what was made stays, nothing that was started lives on."""
    out = tmp_path / "run"
    env = process_environment(tmp_path, XDG_STATE_HOME=str(tmp_path / "xdg"))
    settings = [
        "-c",
        "method=fedavg",
        "-c",
        "rounds=500",
        "-c",
        "rg=1",
        "-c",
        "sample-steps=1",
        "-c",
        "sample-count=1",
    ]
    command = espalier(
        "demo", "--clients", "2", "--edges", "1", "--out", str(out), *settings, "-c", "eval-data="
    )
    with (tmp_path / "demo.log").open("wb") as log:
        demo = subprocess.Popen(
            command, env=env, stdout=log, stderr=log, start_new_session=True, preexec_fn=hear_ctrl_c
        )
    try:
        events = out / "events.jsonl"

        def second_window() -> bool:
            assert demo.poll() is None, (tmp_path / "demo.log").read_text()
            return events.exists() and '"window": 2' in events.read_text()

        wait_until(second_window, 150, "the second window")
        family = psutil.Process(demo.pid).children(recursive=True)
        assert len(family) >= 4  # cloud, SuperLink, edge, clients at least
        os.killpg(demo.pid, signal.SIGINT)
        assert demo.wait(60) == 130
        _, alive = psutil.wait_procs(family, timeout=20)
        assert alive == []
    finally:
        if demo.poll() is None:
            demo.kill()
            demo.wait()
    report = json.loads((out / "report.json").read_text())
    assert report["status"] == "stopped"
    assert len(report["windows"]) >= 1
    assert (out / "checkpoints" / "window-000001" / "meta.json").exists() or len(report["windows"]) > 3
    assert (out / "report.html").exists()
