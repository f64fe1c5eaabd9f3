"""A Hypothesis profile for all tests, and fixtures that several packages use."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from espalier.monitor import logs

# Many tests share two cores, so a slow example proves nothing.
settings.register_profile("espalier", deadline=None)
settings.load_profile("espalier")


@pytest.fixture
def as_json() -> Iterator[None]:
    """Log in JSON during a test, and restore Flower's logger afterwards."""
    flower = logging.getLogger("flwr")
    handlers, level = list(flower.handlers), flower.level
    logs.configure("json")
    yield
    logs.configure("text")
    flower.handlers[:] = handlers
    flower.setLevel(level)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sum on one thread, in the order in which the clients' processes do."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the files and folders that `os.fsync` flushed, in order; a list that grows."""
    paths: list[Path] = []
    flush = os.fsync

    def record(descriptor: int) -> None:
        paths.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return paths
