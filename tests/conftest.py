"""A Hypothesis profile for all tests, and fixtures that several packages use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Many tests share two cores, so a slow example proves nothing.
settings.register_profile("espalier", deadline=None)
settings.load_profile("espalier")


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
