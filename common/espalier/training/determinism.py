"""Bitwise reproducible arithmetic: one thread and deterministic algorithms on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from espalier import lazy

if TYPE_CHECKING:
    import threadpoolctl
else:
    threadpoolctl = lazy.load("threadpoolctl")


@contextlib.contextmanager
def deterministic(wanted: bool = True) -> Iterator[None]:
    """Use one thread and deterministic algorithms inside the context.

    The number of threads determines the order of a sum and so its last bit; one thread is available on all devices. The
    threads of NumPy and scikit-learn are limited, too.

    Parameters
    ----------
    wanted : bool
        Whether to change anything.
    """
    if not wanted:
        yield
        return
    threads = torch.get_num_threads()
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with threadpoolctl.threadpool_limits(1):
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
            torch.set_num_threads(threads)
