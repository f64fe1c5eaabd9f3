"""Termination of a long-lived process by a signal, even while it hangs."""

from __future__ import annotations

import signal
from collections.abc import Callable

from espalier.config.timeouts import STOP


def stop_on_signals(stop: Callable[[], None], seconds: float = STOP) -> None:
    """Call `stop` on SIGTERM and Ctrl-C; after `seconds` the kernel ends the process if it still runs.

    A process whose parent was killed receives SIGTERM, and no SIGKILL follows. The alarm's default action ends the
    process without a thread, a lock or the interpreter, whatever hangs in it.

    Parameters
    ----------
    stop : callable
        Called in the main thread between any two bytecode instructions; it must not take a lock.
    seconds : float
        Time that the process may take to end.
    """

    def handle(*_: object) -> None:
        stop()
        signal.setitimer(signal.ITIMER_REAL, seconds)

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
