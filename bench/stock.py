"""Runs stock SuperLinks, SuperNodes and other processes on free ports, for benches and tests."""

from __future__ import annotations

import itertools
import os
import random
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import psutil
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SUPERLINK_NODE_ID, SubStatus
from flwr.common.serde import fab_to_proto, run_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from bench.waiting import wait_until as wait_until

APP_TOML = """\
[project]
name = "tiny"
version = "1.0.0"
description = "A Flower app for measurements and tests"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.39"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "espalier"

[tool.flwr.app.components]
serverapp = "tinyapp.server:app"
clientapp = "tinyapp.client:app"

[tool.flwr.app.config]
"""
SERVER = """\
from flwr.serverapp import ServerApp
app = ServerApp()

@app.main()
def main(grid, context):
    pass
"""


#: Below Linux's ephemeral ports (32768 and up), so that no other socket is assigned one between choice and use.
PORTS = range(20_000, 32_000)
#: Processes of one pytest-xdist run choose from disjoint parts of `PORTS`.
_PARTS = 16


def _candidates() -> Iterator[int]:
    """Yield this process's ports cyclically, starting at a random one."""
    part = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _PARTS
    size = len(PORTS) // _PARTS
    own = PORTS[part * size : (part + 1) * size]
    for index in itertools.count(random.SystemRandom().randrange(size)):
        yield own[index % size]


_ports = _candidates()


def free_port() -> int:
    """Return a free TCP port of the loopback interface that recent calls did not return."""
    for port in _ports:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable")


def stop_process(process: subprocess.Popen[bytes], patience: float = 3.0) -> None:
    """Terminate a process and its descendants; kill those that are alive after `patience` seconds."""
    try:
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        tree = []
    for member in tree:
        with suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(tree, timeout=patience)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(alive, timeout=patience)
    process.wait(patience)


def environment(home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a Flower process with its own FLWR_HOME and this interpreter first in PATH."""
    bin_folder = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}",
        **more,
    }


@contextmanager
def running(
    command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command with its output in `log`; stop it and its children on exit."""
    with log.open("ab") as out:
        process = subprocess.Popen(list(command), stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        yield process
    finally:
        stop_process(process)


@dataclass(frozen=True)
class SuperLink:
    """A stock SuperLink that serves."""

    fleet: str
    api: str
    pid: int
    log: Path


@contextmanager
def superlink(
    folder: Path, *, isolation: str = "process", fleet_port: int | None = None, more: Sequence[str] = ()
) -> Iterator[SuperLink]:
    """Run a stock ``flower-superlink`` without TLS on free ports of the loopback interface.

    Parameters
    ----------
    folder : Path
        For its FLWR_HOME and log.
    isolation : str
        "process" starts no other process (see :func:`serverapp_grid`); "subprocess" lets it start ServerApps.
    fleet_port : int, optional
        Port of its Fleet API.
    more : sequence of str
        Further arguments.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fleet, api, log = f"127.0.0.1:{fleet_port or free_port()}", free_port(), folder / "superlink.log"
    command = [
        str(Path(sys.executable).with_name("flower-superlink")),
        "--insecure",
        "--isolation",
        isolation,
    ]
    command += ["--host", "127.0.0.1", "--port", str(api), "--fleet-api-address", fleet, *more]
    with running(command, log, environment(folder)) as process:

        def up() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"flower-superlink ended: {log.read_text()[-2000:]}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{api}/health", timeout=2) as answer:
                    return bool(answer.status == 200)
            except (urllib.error.URLError, OSError):
                return False

        wait_until(up, 60, "the SuperLink")
        yield SuperLink(fleet, f"127.0.0.1:{api}", process.pid, log)


@contextmanager
def supernode(folder: Path, fleet: str, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a stock ``flower-supernode`` without TLS."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(Path(sys.executable).with_name("flower-supernode")), "--insecure", "--superlink", fleet]
    command += ["--port", str(free_port()), *more]
    with running(command, folder / "supernode.log", environment(folder)) as process:
        yield process


def app_bundle(client: str, server: str = SERVER, config: str = "") -> Fab:
    """Build the bundle of a small Flower app from the source of its two modules and its default configuration."""
    files: dict[str, bytes | Path] = {
        "pyproject.toml": (APP_TOML + config).encode(),
        "LICENSE": b"MIT",
        "README.md": b"# tiny\n",
        "tinyapp/__init__.py": b"",
        "tinyapp/client.py": client.encode(),
        "tinyapp/server.py": server.encode(),
    }
    return Fab("", build_fab_from_files(files)[0], {})


@contextmanager
def serverapp_grid(
    link: SuperLink, fab: Fab, run_config: Mapping[str, bool | int | float | str] | None = None
) -> Iterator[HttpGrid]:
    """Start a run at a stock SuperLink (isolation "process"), claim its ServerApp task, and yield its Grid."""
    version = RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")
    control = ControlHttpClient.from_server_address(link.api, True, None, [version])
    request = StartRunRequest(
        fab=fab_to_proto(fab),
        override_config=user_config_to_proto(dict(run_config or {})),
        federation=NOOP_FEDERATION_ID,
    )
    control.StartRun(request)
    acquire = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
    claimed = RuntimeHttpClient.from_server_address(link.api, True, None, [version]).AcquireTask(acquire)
    grid = HttpGrid(link.api, insecure=True, token=claimed.token)
    token = RuntimeTokenHttpInterceptor(token=claimed.token)
    client = RuntimeHttpClient.from_server_address(link.api, True, None, [version, token])
    task = client.PullTaskInput(PullTaskInputRequest())
    run = run_from_proto(task.run)
    grid.set_run(run)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = (
        task.task_id,
        run.run_id,
        SUPERLINK_NODE_ID,
    )
    ended = Event()

    def beat() -> None:
        while not ended.wait(10):
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())

    thread = Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield grid
    finally:
        ended.set()
        thread.join(5)
        # As flwr-serverapp does: otherwise the run counts as running until its lease expires.
        client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED, details=""))
        grid.close()
