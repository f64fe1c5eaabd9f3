"""A real cloud: its SuperLink comes back when it dies, with the runs it had, and nothing is left when it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from espalier_server.processes import espalier_command, espalier_env
from espalier_server.records.events import read_events
from espalier_server.superlink.clouds import CLOUD_FILE
from tests.support.paths import ROOT
from tests.support.processes import free_port, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes as Linux shows them")


class LiveCloud:
    """`espalier cloud` as a user starts it, with a registry of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {
            **os.environ,
            **espalier_env(),
            "XDG_STATE_HOME": str(folder / "xdg"),
            "OMP_NUM_THREADS": "1",
        }
        fleet, control = (free_port() for _ in range(2))
        self.log = folder / "cloud.log"
        addresses = ("--listen", f"127.0.0.1:{fleet}", "--control", f"127.0.0.1:{control}")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                espalier_command("cloud", *addresses, "--state", str(folder / "state")),
                cwd=ROOT,
                env=self.env,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        wait_until(lambda: "is ready" in self.log.read_text(), 60, "the cloud")

    def espalier(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            espalier_command(*arguments),
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def superlink(self) -> psutil.Process | None:
        """Return the SuperLink that runs now, if any."""
        for process in psutil.Process(self.process.pid).children():
            if any("flower-superlink" in word for word in process.cmdline()):
                return process
        return None

    def close(self) -> list[psutil.Process]:
        """End it as a service manager would; return what it had started."""
        started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        return started


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[LiveCloud]:
    live = LiveCloud(tmp_path)
    yield live
    if live.process.poll() is None:
        live.close()


def starts(out: Path) -> list[int]:
    """Process ids of the ServerApps that a run had."""
    return [event["pid"] for event in read_events(out / "events.jsonl") if event["event"] == "run"]


def test_a_superlink_that_is_killed_comes_back_with_its_run(cloud: LiveCloud) -> None:
    out = cloud.folder / "out"
    waiting = ("-c", "hello-timeout=300", "-c", "run-id=lost-and-found")
    follower = cloud.espalier("run", "--out", str(out), *waiting)
    wait_until(lambda: len(starts(out)) == 1, 90, "the run")

    link = cloud.superlink()
    assert link is not None
    link.kill()
    wait_until(lambda: len(starts(out)) == 2, 120, "the run's return")
    after = cloud.superlink()
    assert after is not None
    assert after.pid != link.pid

    stop = cloud.espalier("stop", "lost-and-found")
    assert "run lost-and-found stopped" in stop.communicate(timeout=90)[0]
    assert stop.returncode == 0
    said, _ = follower.communicate(timeout=60)
    assert follower.returncode == 0, said
    assert "stopped" in said
    assert (out / "report.html").exists()

    started = cloud.close()
    assert cloud.process.returncode == 130  # interrupted, as by Ctrl-C
    _, alive = psutil.wait_procs(started, timeout=15)
    assert alive == []


def test_a_cloud_locks_its_state_and_reports_failed_runs(cloud: LiveCloud) -> None:
    state = cloud.folder / "state"
    assert (state / CLOUD_FILE).exists()
    fleet, control = (free_port() for _ in range(2))
    second = ("--listen", f"127.0.0.1:{fleet}", "--control", f"127.0.0.1:{control}", "--state", str(state))
    said, _ = cloud.espalier("cloud", *second, "--name", "other").communicate(timeout=60)
    assert "is in use by process" in said

    # A run that fails at the cloud fails the command, with the run's own words.
    run = cloud.espalier("run", "--out", "lonely", "-c", "hello-timeout=1")
    said, _ = run.communicate(timeout=90)
    assert run.returncode == 1
    assert "min-edges" in said
    assert "Traceback" not in said
