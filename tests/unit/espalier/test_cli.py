"""The command line: one clear line and an exit status for every mistake, and no traceback."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from espalier import cli
from espalier.storage.lock import LOCK_FILE
from espalier_server.superlink import clouds, submission
from espalier_server.superlink.clouds import Cloud
from espalier_server.superlink.submission import Submission
from tests.support.paths import ROOT
from tests.support.synthetic_run import made_up_record


def espalier(*arguments: str, cwd: Path, state: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would, with a registry of clouds of its own."""
    env = {
        **os.environ,
        "XDG_STATE_HOME": str(state or cwd / "xdg"),
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "100",
    }
    command = [sys.executable, "-P", "-m", "espalier.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_help_names_every_command_and_comes_at_once(tmp_path: Path) -> None:
    espalier("--help", cwd=tmp_path)  # fills the caches
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = espalier("--help", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 0
    for command in (
        "demo",
        "cloud",
        "edge",
        "client",
        "run",
        "stop",
        "sample",
        "report",
        "status",
        "top",
        "health",
        "pretrain-generator",
        "certs",
        "clients",
        "edges",
    ):
        assert f"  {command} " in done.stdout
    assert seconds < 1.0  # processor time, 0.25 s; importing torch takes several


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = ["torch", "flwr", "grpc", "pydantic", "numpy"]
    program = f"import sys, espalier.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


STATE = ("--state", "st")
EDGE = ("--edge", "127.0.0.1:9093")
BAD: list[tuple[list[str], int, list[str]]] = [
    (["edgy"], 2, ["No such command 'edgy'", "'edge'"]),
    (["run"], 2, ["--out"]),
    (["run", "--out", "r", "-c", "roundz=5"], 2, ["roundz: unknown setting", '"rounds"']),
    (["run", "--out", "r", "-c", "method=fedpdh"], 2, ["method", '"fedpdh"', "fedphd"]),
    (["run", "--out", "r", "-c", "rounds=many"], 2, ["rounds", "whole number", "rounds=60"]),
    (["run", "--out", "r", "-c", "pruning-ratio=1.5"], 2, ["pruning-ratio", "(0, 1)"]),
    (["run", "--out", "r", "-c", "rounds"], 2, ["-c 'rounds'", "key=value"]),
    (["run", "--out", "r", "--cloud", "nowhere"], 2, ["no cloud named 'nowhere'", "espalier cloud"]),
    (["run", "--out", "/proc/x"], 5, ["--out /proc/x cannot be used"]),
    (["demo", "--method", "fedpdh", "--out", "d"], 2, ["method", '"fedpdh"']),
    (["demo", "--edges", "0", "--out", "d"], 2, ["--edges 0"]),
    (["demo", "--data", "digitz", "--out", "d"], 3, ["digitz", "digits"]),
    (["status"], 2, ["no cloud named 'default'"]),
    (["status", "--address", "127.0.0.1:1"], 4, ["127.0.0.1:1: no answer"]),
    (["status", "--address", "192.0.2.1:1"], 2, ["without TLS", "--insecure"]),
    (["top", "--cloud", "nowhere"], 2, ["no cloud named 'nowhere'"]),
    (["stop", "nothing"], 2, ["no run 'nothing'"]),
    (["report", "absent"], 5, ["absent", "--out folder of a run"]),
    (["sample", "absent"], 5, ["absent"]),
    (["sample", "absent", "--count", "0"], 2, ["--count", "0"]),
    (["cloud", *STATE, "--listen", "nonsense"], 4, ["'nonsense'", "HOST:PORT"]),
    (["cloud", *STATE, "--listen", "127.0.0.1:70000"], 4, ["'70000'", "65535"]),
    (["cloud", *STATE, "--listen", "0.0.0.0:9092"], 2, ["--certificate", "--insecure"]),
    (["cloud", *STATE, "--control", "0.0.0.0:8000"], 2, ["--control", "--expose-control"]),
    (["cloud", *STATE, "--name", "../x"], 2, ["--name '../x'"]),
    (["cloud", *STATE, "--metrics-port", "0"], 2, ["--metrics-port"]),
    (["cloud", *STATE, "--metrics-port", "1", "--metrics-host", "a b"], 4, ["--metrics-host"]),
    (["cloud", *STATE, "--monitor", "0.0.0.0:9094"], 2, ["--certificate", "--insecure"]),
    (["edge", "--name", "e", "--cloud", "127.0.0.1:1", *STATE, "--log-format", "xml"], 2, ["--log-format"]),
    (["cloud", "--state", "/proc/x"], 5, ["/proc/x"]),
    (
        ["cloud", *STATE, "--control", "192.0.2.1:8000", "--expose-control"],
        2,
        ["--certificate", "--insecure"],
    ),
    (
        ["cloud", *STATE, "--control", "192.0.2.1:8000", "--expose-control", "--insecure"],
        4,
        ["--control 192.0.2.1:8000"],
    ),
    (["edge", "--name", "a b", "--cloud", "127.0.0.1:1", *STATE], 2, ["--name 'a b'"]),
    (["edge", "--name", "e", "--cloud", "here", *STATE], 4, ["'here'", "HOST:PORT"]),
    (["edge", "--name", "e", "--cloud", "192.0.2.7:9092", *STATE], 2, ["--root-certificates", "--insecure"]),
    (
        ["edge", "--name", "e", "--cloud", "127.0.0.1:1", "--listen", "0.0.0.0:9093", *STATE],
        2,
        ["--certificate"],
    ),
    (["client", "--name", "c", *STATE, "--data", "digits:0/2"], 2, ["--edge"]),
    (["client", "--name", "c", *STATE, "--edge", "x", "--data", "digits:0/2"], 4, ["'x'", "HOST:PORT"]),
    (["client", "--name", "c", *STATE, *EDGE], 2, ["--data is missing"]),
    (["client", "--name", "c", *STATE, *EDGE, "--data", "digits:2/2"], 3, ["digits:2/2"]),
    (
        ["client", "--name", "c", *STATE, *EDGE, "--data", "digits:0/2", "--node-config", "a"],
        2,
        ["'a'", "key=value"],
    ),
    (
        ["client", "--name", "c", *STATE, *EDGE, "--data", "digits:0/2", "--node-config", "a='b"],
        2,
        ["--node-config"],
    ),
    (["client", "--name", "c", *STATE, *EDGE, "--data", "./nothing-here"], 3, ["nothing-here"]),
    (
        ["client", "--name", "c", *STATE, *EDGE, "--data", "digits:0/2", "--level", "0"],
        2,
        ["--level 0 is no"],
    ),
    (["client", "--name", "c", *STATE, *EDGE, "--data", "digits:0/2", "--level", "1.5"], 2, ["--level 1.5"]),
    (
        ["client", "--name", "c", *STATE, *EDGE, "--data", "digits:0/2", "--model", "unet-tiny"],
        2,
        ["--model unet-tiny is no classifier", "resnet10"],
    ),
]


@pytest.mark.parametrize(("arguments", "status", "parts"), BAD, ids=[" ".join(case[0][:6]) for case in BAD])
def test_bad_input(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(sys, "argv", ["espalier", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code == status, said.err
    assert said.out == ""
    assert said.err.startswith("error: ")
    text = " ".join(said.err.split())
    for part in parts:
        assert part in text


def test_an_empty_data_folder(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    done = espalier("client", "--name", "c", *STATE, *EDGE, "--data", "./photos", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "photos" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_holds_another_run_is_kept(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "events.jsonl").write_text('{"event": "run", "run": "old-1"}\n')
    done = espalier("run", "--out", "r", cwd=tmp_path)
    assert done.returncode == 5
    assert "old-1" in done.stderr
    assert "run-id=old-1" in done.stderr


def test_report_builds_the_page(tmp_path: Path) -> None:
    made_up_record(windows=2).write(tmp_path)
    done = espalier("report", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "report.html"
    assert (tmp_path / "report.html").stat().st_size > 10_000


# --- clouds and runs on this machine -------------------------------------------------------------


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    cloud = Cloud("default", "127.0.0.1:1", "127.0.0.1:2", os.getpid(), str(tmp_path / "state"))
    cloud.register()
    return cloud


def hold(cloud: Cloud) -> subprocess.Popen[str]:
    """Own a cloud's state folder in another process, as its supervisor would."""
    lock = str(cloud.folder / LOCK_FILE)
    program = f"""
import fcntl, time
file = open({lock!r}, "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_cloud_is_found_only_while_it_runs(cloud: Cloud) -> None:
    assert clouds.running_clouds() == []
    with hold(cloud) as holder:
        assert clouds.running_clouds() == [cloud]
        assert clouds.find_cloud("default") == cloud
        holder.kill()
    assert clouds.running_clouds() == []
    cloud.unregister()
    assert list(clouds.registry().iterdir()) == []


def test_a_cloud_leaves_its_successors_entry_alone(cloud: Cloud) -> None:
    other = Cloud("default", "127.0.0.1:3", "127.0.0.1:4", 1, cloud.state)
    other.register()
    cloud.unregister()
    assert (clouds.registry() / "default.json").exists()


def test_a_run_is_found_by_either_id(cloud: Cloud, tmp_path: Path) -> None:
    run = Submission(run="r-1", out=str(tmp_path / "out"), config={"rounds": 3}, flower_run="77")
    submission.remember(cloud, run)
    with hold(cloud) as holder:
        assert submission.find_run("r-1") == (cloud, run)
        assert submission.find_run("77") == (cloud, run)
        holder.kill()
    submission.forget(cloud, run)
    assert submission.submissions(cloud) == []


def test_a_run_has_ended_when_its_log_says_so(tmp_path: Path) -> None:
    run = Submission(run="r", out=str(tmp_path))
    (tmp_path / "events.jsonl").write_text('{"event": "failed", "reason": "x"}\n')
    assert run.ended
    later = Submission(run="r", out=str(tmp_path), offset=(tmp_path / "events.jsonl").stat().st_size)
    assert not later.ended  # it was submitted again since
    submission.close_log(later, "stopped", "enough")
    assert later.ended


def test_stop_waits_for_a_clean_end(cloud: Cloud, tmp_path: Path) -> None:
    run = Submission(run="r", out=str(tmp_path))
    submission.close_log(run, "stopped", "")
    assert submission.stop_run(cloud, run, timeout=5)
    assert not (tmp_path / "stop").exists()
