"""Waiting for something to come about; in a module of its own, so that a measured process loads nothing else for it."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], timeout: float, what: str = "it") -> None:
    """Wait until a condition holds.

    Raises
    ------
    TimeoutError
        Naming `what`, after `timeout` seconds.
    """
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come about within {timeout:g} s")
        time.sleep(0.02)
