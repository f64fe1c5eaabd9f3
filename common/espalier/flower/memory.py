"""What becomes of the memory of big payloads: given back at once, or used again until a process has nothing to do."""

from __future__ import annotations

import ctypes
import functools
import gc
import mmap
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Message

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8  # malloc.h of glibc
_MADV_HUGEPAGE = 14  # Linux's mman.h
BIG_BLOCK = 8 << 20
KEPT = 64 << 20
#: Bytes of a payload for which room is made first: of a smaller one what is kept does not matter beside a model.
MUCH = 128 << 20
_ALL = 2**31 - 1


@functools.cache
def give_back_big_blocks() -> bool:
    """Map blocks of 8 MiB or more on their own, keep one arena for all others; return whether that took effect.

    By default glibc raises that limit to 32 MiB once such a block is freed, and keeps what it received in the arenas of
    the threads that received it: 32 replies of 40 MB left 80 MB more behind than 4. With one arena the chunks of
    payloads (5 MiB) use the same pages again and again: to map each anew cost two fifths of a round's processor time.
    Up to 64 MiB of freed memory stay in the process. It is for a process that moves payloads; one that trains
    allocates too often, from too many threads, for it. Elsewhere than on glibc nothing is changed.
    """
    return _tune(((_M_MMAP_THRESHOLD, BIG_BLOCK), (_M_TRIM_THRESHOLD, KEPT), (_M_ARENA_MAX, 1)))


@functools.cache
def keep_freed_blocks() -> bool:
    """Have the process use freed blocks of any size again, until :func:`give_back_freed`; return whether it does so.

    By default glibc maps every block of a network's size anew, and the system must find and clear each of its pages.
    It is for a process that works in bursts and gives back what it does not need when it has nothing to do. What it
    holds at most may be more, where freed blocks lie between others and are too small for the next. Elsewhere than on
    glibc nothing is changed.
    """
    return _tune(((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _ALL), (_M_ARENA_MAX, 1)))


def keeps_freed_blocks() -> bool:
    """Tell whether this process does."""
    return bool(keep_freed_blocks.cache_info().currsize) and keep_freed_blocks()


def _tune(wanted: Sequence[tuple[int, int]]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(sum(mallopt(option, value) for option, value in wanted) == len(wanted))


def in_huge_pages(block: npt.NDArray[np.uint8]) -> None:
    """Ask for pages of 2 MiB below a new block, before it is written to: each page takes the system as long to find.

    NumPy does so for its own arrays; bytes are on pages of 4 KiB. Elsewhere than on Linux nothing is done, nor where
    the system has no such pages.
    """
    advise = _madvise()
    if advise is None or block.nbytes < BIG_BLOCK:
        return
    start = block.ctypes.data
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    advise(first, start + block.nbytes - first, _MADV_HUGEPAGE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    advise.argtypes, advise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return cast("Callable[[int, int, int], int]", advise)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    trim.argtypes, trim.restype = (ctypes.c_size_t,), ctypes.c_int
    return cast("Callable[[int], int]", trim)


def give_back_freed() -> None:
    """Give every whole page of freed blocks back to the system, also those between blocks in use.

    By itself the allocator only gives back what lies above its last block in use. Elsewhere than on glibc nothing is
    done.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


class Sweeper:
    """Collects cyclic garbage where payloads are left in it.

    ``RecordDict.array_records`` and its like build an object that refers to itself and to the whole content, so a
    message that was read through them is not freed when it is dropped, but when Python next looks for cycles: many
    payloads later. Our own code does not read so, but a user's app may. To look for cycles costs a process with torch
    some tenths of a second, so it is done only for payloads that outlive their message.

    Parameters
    ----------
    every : int
        Bytes of payload left behind between two collections.
    """

    def __init__(self, every: int = 32_000_000) -> None:
        self._every = every
        self._left = 0
        self._dropped: list[list[tuple[weakref.ref[ArrayRecord], int]]] = []  # an item a message

    def expect(self, message: Message) -> None:
        """Note a message that is about to be dropped."""
        records = message.content.values() if message.has_content() else ()
        payloads = [record for record in records if isinstance(record, ArrayRecord)]
        self._dropped.append([(weakref.ref(p), sum(len(a.data) for a in p.values())) for p in payloads])

    def sweep(self, *, but_last: bool = False) -> None:
        """Collect, if enough of what was dropped by now is still there.

        Parameters
        ----------
        but_last : bool
            Leave the newest message out: a loop over replies holds it until the next one comes.
        """
        judged = self._dropped[:-1] if but_last else self._dropped
        self._dropped = self._dropped[len(judged) :]
        self._left += sum(size for payloads in judged for record, size in payloads if record() is not None)
        if self._left >= self._every:
            self._left = 0
            gc.collect()
