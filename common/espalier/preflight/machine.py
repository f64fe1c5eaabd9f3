"""Checks of this machine: versions, state folder, disk, memory, node key."""

from __future__ import annotations

import platform
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from espalier import distribution
from espalier.environment import check_libraries
from espalier.errors import ConfigError, StateError
from espalier.preflight.findings import Findings
from espalier.preflight.tls import check_mode
from espalier.storage.lock import is_locked

GB = 1e9


@dataclass(frozen=True)
class Needs:
    """Bytes of disk and memory that a tier needs to start, and those that runs of the larger models take."""

    disk: float
    memory: float
    comfortable_disk: float
    comfortable_memory: float


def check_versions(found: Findings, extra: str = "", shown: tuple[str, ...] = ()) -> bool:
    """Check that the libraries of the base and of an extra are installed, and that Flower is in range.

    Parameters
    ----------
    extra : str
        The extra that the tier needs; "" for the base alone.
    shown : tuple of str
        Distributions whose versions are reported beside those of Python, Espalier and Flower.

    Returns
    -------
    bool
        Whether all are there.
    """
    versions = {"python": platform.python_version(), **distribution.versions("flwr", *shown)}
    try:
        check_libraries(*filter(None, [extra]))
    except ConfigError as error:
        found.fault("versions", error)
        return False
    found.ok("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))
    return True


def check_state(found: Findings, state: Path) -> bool:
    """Check that this user can write the state folder; return whether no process holds it."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        probe = state / f".{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        found.fail(
            "state", f"{state} cannot be written ({error.strerror})", "give a folder this user may write"
        )
        return False
    if is_locked(state):
        found.warn(
            "state", f"{state} is held by a running process", "stop that process before you start another one"
        )
        return False
    found.ok("state", f"{state} can be written")
    return True


def check_space(found: Findings, needs: Needs, state: Path) -> None:
    """Compare free disk space and memory with what the tier needs."""
    folder = next((path for path in (state, *state.resolve().parents) if path.exists()), Path("/"))
    disk = shutil.disk_usage(folder).free
    _compare(found, "disk", disk, needs.disk, needs.comfortable_disk, f"free below {folder}")
    memory = available_memory()
    if memory is not None:
        _compare(found, "memory", memory, needs.memory, needs.comfortable_memory, "available")


def _compare(found: Findings, check: str, have: float, needed: float, comfortable: float, where: str) -> None:
    said = f"{have / GB:.1f} GB {where}"
    if have < needed:
        found.fail(check, said, f"this tier needs {needed / GB:g} GB; free some")
    elif have < comfortable:
        found.warn(check, said, f"runs of the larger models need {comfortable / GB:g} GB")
    else:
        found.ok(check, said)


def available_memory() -> int | None:
    """Return the bytes of memory that a new process can use, on this machine and within its container's limit."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def check_node_key(found: Findings, path: Path, given: bool) -> object | None:
    """Check a node key's file; return the key, None where there is none yet or it cannot be used."""
    from espalier.flower.node_state import load_key

    if not given and not path.exists():
        found.ok("node key", f"{path} is made at the first start")
        return None
    try:
        key = load_key(path)
    except StateError as error:
        found.fail("node key", str(error), "give a private EC key without a passphrase, of this user")
        return None
    check_mode(found, "node key", path, f"{path} can be read")
    return key
