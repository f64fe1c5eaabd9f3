"""Arithmetic that gives the same bits every time: one thread, deterministic algorithms, the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def deterministic(wanted: bool = True) -> Iterator[None]:
    """Compute with one thread and deterministic algorithms inside, as before outside.

    How many threads share a sum decides its order and so its last bit. One thread is the only number
    that all devices have. NumPy's and scikit-learn's threads are limited, too.

    Parameters
    ----------
    wanted : bool
        False changes nothing.
    """
    if not wanted:
        yield
        return
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    former = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    with threadpool_limits(1):
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(former, warn_only=warned)
            torch.set_num_threads(threads)
