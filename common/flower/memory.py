"""Gets the memory of big payloads back at once, so that the footprint of a busy process is what it holds."""

from __future__ import annotations

import ctypes
import functools
import gc

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h of glibc
BIG_BLOCK = 8 << 20
KEPT = 64 << 20


@functools.cache
def give_back_big_blocks() -> bool:
    """Map blocks of 8 MiB or more on their own, keep one arena for all others; return whether that took effect.

    By default glibc raises that limit to 32 MiB once such a block is freed, and keeps what it received in the arenas of
    the threads that received it: 32 replies of 40 MB left 80 MB more behind than 4. With one arena the chunks of
    payloads (5 MiB) use the same pages again and again: to map each anew cost two fifths of a round's processor time.
    Up to 64 MiB of freed memory stay in the process. It is for a process that moves payloads; one that trains
    allocates too often, from too many threads, for it. Elsewhere than on glibc nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    wanted = ((_M_MMAP_THRESHOLD, BIG_BLOCK), (_M_TRIM_THRESHOLD, KEPT), (_M_ARENA_MAX, 1))
    return bool(sum(mallopt(option, value) for option, value in wanted) == len(wanted))


class Sweeper:
    """Collects cyclic garbage once enough payload may be in it.

    ``RecordDict.array_records`` and its like build an object that refers to itself and to the whole content, so a
    message that was read through them is not freed when it is dropped, but when Python next looks for cycles: many
    payloads later.

    Parameters
    ----------
    every : int
        Bytes of payload between two collections.
    """

    def __init__(self, every: int = 32_000_000) -> None:
        self._every = every
        self._seen = 0

    def dropped(self, size: int) -> None:
        """Note that a message with `size` bytes of payload was dropped."""
        self._seen += size
        if self._seen >= self._every:
            self._seen = 0
            gc.collect()
