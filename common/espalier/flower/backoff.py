"""How long to wait: between attempts to reach a server, and between polls of one that answers at once."""

from __future__ import annotations

import random
import time


class Backoff:
    """Exponential back-off with jitter, bounded.

    Parameters
    ----------
    first : float
        Mean of the first wait, in seconds.
    cap : float
        No wait is longer, in seconds.
    generator : random.Random, optional
        Source of the jitter. Jitter keeps many nodes from returning at once; it is no part of a run's
        results, so by default it is not seeded by the run.
    """

    def __init__(self, first: float = 0.2, cap: float = 10.0, generator: random.Random | None = None) -> None:
        self._first = first
        self._cap = cap
        self._random = generator or random.Random()
        self._tries = 0

    def next(self) -> float:
        """Return the next wait in seconds: 0.75 to 1.5 times ``first * 2**tries``, never above `cap`."""
        span = min(self._cap, 1.5 * self._first * 2.0**self._tries)
        if span < self._cap:
            self._tries += 1
        return span * self._random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Start again from the first wait."""
        self._tries = 0


class PollPace:
    """Adaptive polling: fast while something is going on, slow while nothing is.

    A server that holds a poll until there is a message (ours does) is asked again at once. One that answers at once (a
    stock SuperLink) is asked after `share` of the time since the last activity, so that the wait for a message grows
    by no more than that share, whether the cloud pauses for a tenth of a second or for minutes; a poll every 15 ms
    from four edges took more of a SuperLink's processor than all else between two windows.

    Parameters
    ----------
    fast, slow : float
        Shortest and longest wait, seconds.
    share : float
        Of the time since the last activity.
    held : float
        A poll that took so many seconds was held.
    """

    def __init__(self, fast: float = 0.015, slow: float = 1.0, share: float = 0.1, held: float = 0.3) -> None:
        self._fast, self._slow, self._share, self._held = fast, slow, share, held
        self._active_at = time.monotonic()

    def activity(self) -> None:
        """Note that a message came or went."""
        self._active_at = time.monotonic()

    def after(self, took: float) -> float:
        """Return how long to wait after a poll that took `took` seconds and brought nothing."""
        if took >= self._held:
            return 0.0
        idle = time.monotonic() - self._active_at
        return min(self._slow, max(self._fast, self._share * idle))
