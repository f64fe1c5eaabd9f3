"""Child processes that end with their parent: after a signal, after an error, and on Linux even after SIGKILL."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from espalier.config.timeouts import KILL
from espalier.errors import EspalierError, StateError

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Process:
    """A child process that leads its own process group."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.popen.poll() is None

    def last_lines(self, lines: int = 1) -> str:
        """Return the last non-empty lines of its log."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def spawn(name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> Process:
    """Start a child that leads its own process group and writes its output to `log`.

    Ctrl-C in the terminal does not reach it; `stop` ends it. On Linux it receives SIGTERM when the thread that
    started it ends, so start children from a thread that outlives them.

    Raises
    ------
    StateError
        The log cannot be written.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("ab")
    except OSError as error:
        raise StateError(
            f"cannot write {log}: {error.strerror}; check the permissions of the folder"
        ) from error
    with output:
        popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()) if sys.platform == "linux" else None,
        )
    return Process(name, popen, log)


def _die_with(parent: int) -> Callable[[], None]:
    """Return the function that a new child calls so that the kernel terminates it when `parent` dies."""
    libc = ctypes.CDLL(None)  # loaded before the fork: after it the child may do as little as possible

    def arm() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent died before the call took effect
            os._exit(1)

    return arm


def stop(processes: Sequence[Process], grace: float = KILL) -> None:
    """End children and their process groups: SIGTERM to all, SIGKILL to those that live after `grace` seconds."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + grace
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.popen.wait(max(0.0, deadline - time.monotonic()))
    for process in processes:
        # Also when the leader has ended: others of its group may have ignored SIGTERM.
        while time.monotonic() < deadline and _group_alive(process):
            time.sleep(_POLL_SECONDS)
        _signal(process, signal.SIGKILL)
        process.popen.wait()


def _signal(process: Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.popen.pid, number)


def _group_alive(process: Process) -> bool:
    try:
        os.killpg(process.popen.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


class Group:
    """Children that are stopped together, in reverse order of their start; a context manager."""

    def __init__(self, grace: float = KILL) -> None:
        self.grace = grace
        self.processes: list[Process] = []

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(
        self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
    ) -> Process:
        """Start a child; see `spawn`."""
        process = spawn(name, command, log, env)
        self.processes.append(process)
        return process

    def ended(self) -> list[Process]:
        """Return the children that have ended without `stop`."""
        return [process for process in self.processes if not process.running]

    def check(self) -> None:
        """Raise EspalierError with the last line of a child's log if one has ended without `stop`."""
        for process in self.ended():
            line = process.last_lines().removeprefix("error: ")
            code = process.popen.returncode
            raise EspalierError(f"{process.name} ended with status {code}: {line} (log: {process.log})")

    def wait_until(self, ready: Callable[[], bool], what: str, timeout: float) -> None:
        """Wait until `ready()` returns true; fail as soon as a child ends.

        Raises
        ------
        EspalierError
            A child ended, or `timeout` seconds passed; the message names `what` was not ready.
        """
        deadline = time.monotonic() + timeout
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise EspalierError(f"{what} is not ready after {timeout:g} s; see the logs of its processes")
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """End all children; safe to call twice."""
        processes, self.processes = self.processes[::-1], []
        with signals_ignored():
            stop(processes, self.grace)


def process_alive(pid: int | None) -> bool:
    """Return whether a process with this id runs; False for None and for a zombie."""
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return True


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    old = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """Ignore SIGINT, SIGTERM and SIGHUP while children are being stopped, so that all of them are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    old = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def espalier_command(*arguments: str) -> list[str]:
    """Return the command that runs `espalier` with this interpreter."""
    return [sys.executable, "-P", "-m", "espalier.cli", *arguments]


def espalier_env() -> dict[str, str]:
    """Return environment variables for child processes: this environment's scripts first on PATH, no telemetry."""
    return {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
    }


def free_ports(count: int) -> list[int]:
    """Return distinct loopback ports that are free now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def listens(host: str, port: int) -> bool:
    """Return whether the address accepts a connection now."""
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False
