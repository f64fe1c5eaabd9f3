"""Memory management for large payloads: settings of glibc's allocator, trimming the heap, and cyclic garbage."""

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
LARGE_BLOCK = 8 << 20
TRIM_THRESHOLD = 64 << 20
#: Bytes from which on the heap is trimmed before a payload is assembled; below, the unused heap does not matter.
LARGE_PAYLOAD = 128 << 20
_ALL = 2**31 - 1


@functools.cache
def unmap_large_blocks_on_free() -> bool:
    """Allocate blocks of 8 MiB or more with mmap, and all others from one arena; return whether that took effect.

    By default glibc raises the mmap threshold to 32 MiB once such a block is freed, and retains received data in the
    arena of each receiving thread: 32 replies of 40 MB left 80 MB more behind than 4 replies. With one arena the
    chunks of payloads (5 MiB) reuse the same pages; mapping each anew took two fifths of the CPU time of a round.
    Up to 64 MiB of freed memory stay in the process. Meant for a process that moves payloads; one that trains
    allocates too often, from too many threads. On other C libraries nothing changes.
    """
    return _tune(((_M_MMAP_THRESHOLD, LARGE_BLOCK), (_M_TRIM_THRESHOLD, TRIM_THRESHOLD), (_M_ARENA_MAX, 1)))


@functools.cache
def retain_freed_blocks() -> bool:
    """Have the allocator reuse freed blocks of any size until :func:`trim_heap`; return whether that took effect.

    By default glibc maps every block of a network's size anew, and the kernel must find and clear its pages. Meant for
    a process that works in bursts and trims its heap when it is idle. Fragmentation may raise its peak memory. On
    other C libraries nothing changes.
    """
    return _tune(((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _ALL), (_M_ARENA_MAX, 1)))


def retains_freed_blocks() -> bool:
    """Return whether :func:`retain_freed_blocks` took effect in this process."""
    return bool(retain_freed_blocks.cache_info().currsize) and retain_freed_blocks()


def _tune(wanted: Sequence[tuple[int, int]]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(sum(mallopt(option, value) for option, value in wanted) == len(wanted))


def in_huge_pages(block: npt.NDArray[np.uint8]) -> None:
    """Advise the kernel to back a new block with huge pages (2 MiB) before it is written to; they fault in faster.

    NumPy does so for its own arrays; a `bytes` object lies on pages of 4 KiB. Only on Linux, where it has huge pages.
    """
    advise = _madvise()
    if advise is None or block.nbytes < LARGE_BLOCK:
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


def trim_heap() -> None:
    """Return every whole page of freed memory to the kernel, also between blocks in use.

    By itself the allocator returns only what lies above its last block in use. On other C libraries than glibc this
    does nothing.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


class CycleCollector:
    """Runs the garbage collector when reference cycles hold payloads of dropped messages.

    ``RecordDict.array_records`` and similar properties build an object that refers to itself and to the whole content,
    so a message read through them is not freed when it is dropped, but when Python next collects cycles: many payloads
    later. Espalier does not use them, but a user's app may. A collection takes some tenths of a second in a process
    with torch, so it runs only when payloads outlive their message.

    Parameters
    ----------
    every : int
        Bytes of retained payloads between two collections.
    """

    def __init__(self, every: int = 32_000_000) -> None:
        self._every = every
        self._retained = 0
        self._dropped: list[list[tuple[weakref.ref[ArrayRecord], int]]] = []  # one item per message

    def track(self, message: Message) -> None:
        """Watch the payloads of a message that is about to be dropped."""
        records = message.content.values() if message.has_content() else ()
        payloads = [record for record in records if isinstance(record, ArrayRecord)]
        self._dropped.append([(weakref.ref(p), sum(len(a.data) for a in p.values())) for p in payloads])

    def collect(self, *, but_last: bool = False) -> None:
        """Collect garbage if enough payloads of dropped messages are still alive.

        Parameters
        ----------
        but_last : bool
            Ignore the newest message: a loop over replies holds a reference until the next one arrives.
        """
        checked = self._dropped[:-1] if but_last else self._dropped
        self._dropped = self._dropped[len(checked) :]
        self._retained += sum(
            size for payloads in checked for record, size in payloads if record() is not None
        )
        if self._retained >= self._every:
            self._retained = 0
            gc.collect()
