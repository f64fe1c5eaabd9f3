"""Waits for a condition; a module of its own, so that a measured process imports nothing else for it."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], timeout: float, what: str = "it") -> None:
    """Wait until a condition holds.

    Raises
    ------
    TimeoutError
        The condition does not hold after `timeout` seconds; the message names `what`.
    """
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not ready after {timeout:g} s")
        time.sleep(0.02)
