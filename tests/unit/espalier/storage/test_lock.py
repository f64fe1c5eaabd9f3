"""Locks between processes."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from espalier.errors import StateError
from espalier.storage.lock import LOCK_FILE, FolderInUseError, FolderLock, holder, is_locked, locked_file

HOLD = """
import pathlib, sys
from espalier.storage.lock import FolderLock
lock = FolderLock(pathlib.Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_one_dies(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "locked\n"
        assert is_locked(tmp_path)
        with pytest.raises(
            FolderInUseError, match=f"in use by process {first.pid}; stop that process"
        ) as raised:
            FolderLock(tmp_path)
        # Neither the refused attempt nor the check removed what the owner wrote.
        assert raised.value.holder == holder(tmp_path) == str(first.pid)
    finally:
        first.kill()
        first.wait()
    assert not is_locked(tmp_path)
    lock = FolderLock(tmp_path)
    assert holder(tmp_path) == str(os.getpid())
    lock.release()
    lock.release()
    assert not is_locked(tmp_path)


def test_a_lock_of_an_older_version_counts(tmp_path: Path) -> None:
    with (tmp_path / LOCK_FILE).open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert is_locked(tmp_path)
        with pytest.raises(FolderInUseError, match="in use by process unknown"):
            FolderLock(tmp_path)
    FolderLock(tmp_path).release()


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    first = FolderLock(tmp_path)
    timer = threading.Timer(0.4, first.release)
    timer.start()
    FolderLock(tmp_path, timeout=30.0).release()
    timer.join()


def test_a_check_does_not_make_an_attempt_fail(tmp_path: Path) -> None:
    FolderLock(tmp_path).release()
    with (tmp_path / LOCK_FILE).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # another process is inside `is_locked`
        timer = threading.Timer(0.05, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        timer.start()
        FolderLock(tmp_path).release()
        timer.join()


def test_a_folder_that_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match=r"cannot write .*; choose another folder"):
        FolderLock(tmp_path / "file" / "state")
    with (
        pytest.raises(StateError, match=r"cannot write .*; choose another folder"),
        locked_file(tmp_path / "file" / "x"),
    ):
        pass
    assert not is_locked(tmp_path / "file")
    assert holder(tmp_path) == "unknown"


def test_changes_to_a_file_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "counter"
    path.write_text("0")

    def count() -> None:
        for _ in range(5):
            with locked_file(path):
                value = int(path.read_text())
                time.sleep(0.001)
                path.write_text(str(value + 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() == "20"
