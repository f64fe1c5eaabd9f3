"""Atomic and durable replacement of files and folders."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from espalier.errors import StateError

#: Errors by which a file system says that it cannot flush a folder: the rename is then as durable as it gets.
_NOT_SUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_MISPLACED = frozenset({errno.ENOTDIR, errno.EEXIST, errno.EISDIR})


@contextlib.contextmanager
def replacing(path: Path, mode: int | None = None) -> Iterator[Path]:
    """Yield a temporary path whose file replaces `path` when the block ends without an exception.

    The file is flushed to the disk, renamed, and its folder is flushed: after a crash or a power cut, `path` holds
    the old content or the new one. Two processes that write the same file do not mix their content.

    Parameters
    ----------
    path : Path
        The file to replace; its folder is created.
    mode : int, optional
        Permissions of the file, e.g. ``0o600``, in force before its content is written. By default those of any
        new file.

    Yields
    ------
    Path
        An empty file in the same folder.

    Raises
    ------
    StateError
        The file cannot be written; the old one is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        os.close(os.open(temporary, flags, 0o666 if mode is None else mode))
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes, mode: int | None = None) -> None:
    """Replace a file's content; see :func:`replacing`."""
    with replacing(path, mode) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str, mode: int | None = None) -> None:
    """Replace a file's content with UTF-8 text; see :func:`replacing`."""
    write_bytes(path, text.encode(), mode)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder that replaces `path` when the block ends without an exception.

    Its files are flushed to the disk before the rename. Between two renames there is an instant in which `path` does
    not exist; a process that dies there leaves the old folder as ``.NAME.PID-THREAD.old``.

    Parameters
    ----------
    path : Path
        The folder to replace; its parent is created.

    Yields
    ------
    Path
        An empty folder in the same parent, for plain files.

    Raises
    ------
    StateError
        The folder cannot be written; the old one is untouched.
    """
    prefix = f".{path.name}.{os.getpid()}-{threading.get_ident()}"
    new, old = path.with_name(f"{prefix}.partial"), path.with_name(f"{prefix}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        yield new
        for file in new.iterdir():
            _sync(file)
        sync_folder(new)
        if path.exists():
            path.replace(old)
        try:
            new.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                old.replace(path)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk, so that a rename inside it survives a power cut.

    Raises
    ------
    OSError
        The folder cannot be opened or flushed.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)


def write_error(path: Path, error: Exception) -> StateError:
    """Return the error to raise where `path` cannot be written, with advice that fits the cause."""
    folder = path.parent
    number = error.errno if isinstance(error, OSError) else None
    if number in _FULL:
        advice = f"free disk space below {folder}"
    elif number in _DENIED:
        advice = f"give this user write permission to {folder}"
    elif number in _MISPLACED:
        advice = "choose another folder"
    else:
        advice = f"check free disk space and permissions of {folder}"
    return StateError(f"cannot write {path}: {_reason(error)}; {advice}")


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _sync(file: Path) -> None:
    # Opened for reading: fsync flushes what any descriptor wrote, also a library's that is closed by now.
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
