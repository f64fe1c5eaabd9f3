"""Child processes: none outlives what started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from espalier.errors import EspalierError
from espalier_server.processes import Group, espalier_env, free_ports, listens, spawn, stop
from tests.support.paths import ROOT
from tests.support.processes import wait_until

SLEEP = "import time; time.sleep(600)"
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}])
print(child.pid, flush=True)
child.wait()
"""


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_output_goes_to_the_log(tmp_path: Path) -> None:
    process = spawn(
        "x",
        python("import os; print('one'); print(os.environ['EXTRA'])"),
        tmp_path / "a/x.log",
        {"EXTRA": "two"},
    )
    process.popen.wait(10)
    assert process.log.read_text() == "one\ntwo\n"
    assert process.last_lines() == "two"
    assert process.last_lines(2) == "one\ntwo"


def test_stop_ends_those_that_listen_and_those_that_do_not(tmp_path: Path) -> None:
    polite = spawn("polite", python(SLEEP), tmp_path / "polite.log")
    stubborn = spawn("stubborn", python(STUBBORN), tmp_path / "stubborn.log")
    wait_until(lambda: stubborn.last_lines() == "ready", 15)
    start = time.monotonic()
    stop([polite, stubborn], grace=0.5)
    assert time.monotonic() - start < 5
    assert polite.popen.returncode == -signal.SIGTERM
    assert stubborn.popen.returncode == -signal.SIGKILL


def test_stop_reaches_grandchildren(tmp_path: Path) -> None:
    process = spawn("parent", python(PARENT), tmp_path / "parent.log")
    wait_until(lambda: "ready" in process.last_lines(2), 15)
    grandchild = int(process.log.read_text().split()[0])
    stop([process], grace=0.5)
    wait_until(lambda: gone(grandchild), 15)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_children_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from espalier_server.processes import spawn; "
        f"p = spawn('child', [sys.executable, '-c', {SLEEP!r}], Path({str(tmp_path / 'c.log')!r})); "
        "print(p.popen.pid, flush=True); time.sleep(600)"
    )
    env = {**os.environ, **espalier_env()}
    with subprocess.Popen(python(program), stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not gone(child)
        parent.kill()
        parent.wait()
    wait_until(lambda: gone(child), 15)


def test_a_group_ends_on_errors_and_interruptions(tmp_path: Path) -> None:
    group = Group(grace=2)
    pids = [group.start(str(i), python(SLEEP), tmp_path / f"{i}.log").popen.pid for i in range(2)]

    def interrupted() -> None:
        with group:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(gone(pid) for pid in pids)


def test_waiting_fails_at_once_when_a_child_dies(tmp_path: Path) -> None:
    with Group() as group:
        group.start("edge-1", python("import sys; sys.exit('error: port is taken')"), tmp_path / "e.log")
        with pytest.raises(
            EspalierError, match=r"edge-1 ended with status 1: port is taken \(log: .*e\.log\)"
        ):
            group.wait_until(lambda: False, "the tree", timeout=30)


def test_waiting_has_an_end(tmp_path: Path) -> None:
    with Group(grace=2) as group:
        group.start("x", python(SLEEP), tmp_path / "x.log")
        with pytest.raises(EspalierError, match=r"the tree is not ready after 0\.2 s"):
            group.wait_until(lambda: False, "the tree", timeout=0.2)


def test_groups_stop_outside_the_main_thread(tmp_path: Path) -> None:
    group = Group(grace=2)
    process = group.start("x", python(SLEEP), tmp_path / "x.log")
    thread = threading.Thread(target=group.stop)
    thread.start()
    thread.join(10)
    assert not process.running


def test_free_ports_are_free_and_different() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    assert not any(listens("127.0.0.1", port) for port in ports)
