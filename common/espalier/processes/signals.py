"""Ending a long-lived process by a signal, also where something in it hangs."""

from __future__ import annotations

import signal
from collections.abc import Callable

from espalier.config.timeouts import STOP


def stop_on_signals(stop: Callable[[], None], seconds: float = STOP) -> None:
    """Call `stop` on SIGTERM and Ctrl-C, and let the kernel end the process if it still lives some time later.

    A process whose parent was killed gets SIGTERM and nobody who would kill it afterwards. The alarm needs
    no thread, no lock and no interpreter: its default action ends the process whatever hangs in it.

    Parameters
    ----------
    stop : callable
        Called in the main thread, between any two of its instructions; it must take no lock.
    seconds : float
        How long the process may take to end.
    """

    def handle(*_: object) -> None:
        stop()
        signal.setitimer(signal.ITIMER_REAL, seconds)

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
