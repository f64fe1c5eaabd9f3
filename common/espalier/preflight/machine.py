"""Checks of this machine: versions, state folder, disk, memory, device, data, node key."""

from __future__ import annotations

import os
import platform
import shutil
import uuid
from pathlib import Path

from espalier import distribution
from espalier.errors import EspalierError, StateError
from espalier.preflight.findings import Findings
from espalier.preflight.tls import check_mode
from espalier.storage.lock import is_locked

GB = 1e9
FLOWER = "1.39"
#: What each tier needs to start at all, and what a run of the U-Nets here is comfortable with: (disk, memory) in bytes.
LEAST = {"cloud": (0.5 * GB, 1.0 * GB), "edge": (0.1 * GB, 0.25 * GB), "client": (0.2 * GB, 0.5 * GB)}
GOOD = {"cloud": (5.0 * GB, 3.0 * GB), "edge": (1.0 * GB, 1.0 * GB), "client": (1.0 * GB, 1.5 * GB)}


def check_versions(found: Findings, packages: tuple[str, ...]) -> None:
    """Check what is installed."""
    versions = {"python": platform.python_version(), **distribution.versions("flwr", *packages)}
    for name in packages:
        if name not in versions:
            found.fail("versions", f"{name} is not installed", f"pip install {name}")
            return
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    if versions["flwr"].split(".")[:2] != FLOWER.split("."):
        found.fail("versions", said, f"pip install 'flwr=={FLOWER}.*'")
    else:
        found.ok("versions", said)


def check_state(found: Findings, state: Path) -> bool:
    """Check that the state folder is ours to write; tell whether no process holds it."""
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
            "state", f"{state} is held by a running process", "stop it first, if this is to replace it"
        )
        return False
    found.ok("state", f"{state} can be written")
    return True


def check_space(found: Findings, tier: str, state: Path) -> None:
    """Check disk and memory against what the tier needs."""
    folder = next((path for path in (state, *state.resolve().parents) if path.exists()), Path("/"))
    _against(
        found, "disk", shutil.disk_usage(folder).free, LEAST[tier][0], GOOD[tier][0], f"free below {folder}"
    )
    memory = available_memory()
    if memory is not None:
        _against(found, "memory", memory, LEAST[tier][1], GOOD[tier][1], "available")


def _against(found: Findings, check: str, have: float, least: float, good: float, where: str) -> None:
    said = f"{have / GB:.1f} GB {where}"
    if have < least:
        found.fail(check, said, f"this tier needs {least / GB:g} GB; free some")
    elif have < good:
        found.warn(check, said, f"{good / GB:g} GB are comfortable for the larger models")
    else:
        found.ok(check, said)


def available_memory() -> int | None:
    """Return the bytes that a new process can have: the machine's, or its container's limit if that is less."""
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


def check_device(found: Findings, device: str) -> None:
    """Check that the device the client is to train on is there."""
    from espalier.training.trainer import resolve_device

    found.attempt("device", lambda: f"{device}: trains on {resolve_device(device)}, {os.cpu_count()} cores")


def check_data(found: Findings, spec: str) -> None:
    """Open a client's data and count them."""
    import numpy as np

    from espalier.data.spec import open_data

    try:
        images = open_data(spec)
        first = images.fetch(np.arange(1)) if len(images) else None
    except EspalierError as error:
        found.fault("data", error)
        return
    if first is None:
        found.fail("data", f"{spec} holds no image", "give another --data")
        return
    held = int((np.bincount(images.labels, minlength=len(images.classes)) > 0).sum())
    shape = "x".join(map(str, images.shape))
    said = f"{len(images)} images of {shape} in {held} of {len(images.classes)} classes"
    if len(images) < 10:
        found.warn("data", said, "few images: is it the right folder?")
    else:
        found.ok("data", said)


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
