"""Files and folders that are replaced whole."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from espalier.errors import StateError
from espalier.storage import atomic
from espalier.storage.atomic import replacing, replacing_folder, write_bytes, write_text


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_atomic_write_leaves_no_part(tmp_path: Path) -> None:
    write_bytes(tmp_path / "new" / "x", b"1")
    write_text(tmp_path / "new" / "x", "zwei")
    assert content(tmp_path / "new") == {"x": b"zwei"}


def test_the_file_and_then_its_folder_are_flushed(tmp_path: Path, synced: list[Path]) -> None:
    write_bytes(tmp_path / "x", b"1")
    temporary, folder = synced
    assert temporary.parent == folder == tmp_path
    assert temporary.name.startswith(".x.")


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    write_bytes(tmp_path / "x", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os if broken == "fsync" else Path, broken, full)
        with pytest.raises(StateError, match=r"cannot write .*x: No space left .*; free disk space below"):
            write_bytes(tmp_path / "x", b"new")
    assert content(tmp_path) == {"x": b"old"}


def test_an_exception_in_the_block_leaves_the_old_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "x", b"old")

    def fail() -> None:
        with replacing(tmp_path / "x") as temporary:
            temporary.write_bytes(b"new")
            raise ValueError("no tensor")

    with pytest.raises(ValueError, match="no tensor"):
        fail()
    assert content(tmp_path) == {"x": b"old"}


def test_a_private_file_is_private_before_it_has_content(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"old, readable by everyone")
    with replacing(tmp_path / "key", 0o600) as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
        temporary.write_bytes(b"secret")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EACCES, "give this user write permission to"),
        (errno.ENOTDIR, "choose another folder"),
        (errno.EIO, "check free disk space and permissions of"),
    ],
)
def test_the_advice_fits_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StateError, match=f"{os.strerror(number)}; {advice}"):
        write_bytes(tmp_path / "x", b"1")


def test_a_file_system_that_cannot_flush_folders_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush: Callable[[int], None] = os.fsync

    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    write_bytes(tmp_path / "x", b"1")
    assert content(tmp_path) == {"x": b"1"}


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, synced: list[Path]) -> None:
    for names in ("ab", "bc"):
        synced.clear()
        with replacing_folder(tmp_path / "model") as new:
            for name in names:
                (new / name).write_text(name)
        assert content(tmp_path / "model") == {name: name.encode() for name in names}
        assert {path.name for path in synced[:2]} == set(names)
        assert synced[-1] == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_replacement_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with replacing_folder(tmp_path / "model") as new:
        (new / "a").write_text("old")
    rename = Path.replace

    def fail(source: Path, target: Path) -> Path:
        if source.name.endswith(".partial"):
            full()
        return rename(source, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(StateError, match="free disk space"), replacing_folder(tmp_path / "model") as new:
        (new / "a").write_text("new")
    assert content(tmp_path / "model") == {"a": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match=r"cannot write .*file/x: .*; choose another folder"):
        write_bytes(tmp_path / "file" / "x", b"1")
    assert isinstance(atomic.write_error(tmp_path, ValueError("no tensor")), StateError)
