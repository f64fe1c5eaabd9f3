"""Wait times: exponential backoff between connection attempts, and adaptive intervals between polls."""

from __future__ import annotations

import random
import time


class Backoff:
    """Exponential backoff with jitter and an upper bound.

    Parameters
    ----------
    first : float
        Approximate first wait, in seconds.
    cap : float
        Upper bound of every wait, in seconds.
    generator : random.Random, optional
        Source of the jitter. Jitter keeps many nodes from reconnecting at once; it does not affect the results of
        a run, so by default it is not seeded.
    """

    def __init__(self, first: float = 0.2, cap: float = 10.0, generator: random.Random | None = None) -> None:
        self._first = first
        self._cap = cap
        self._random = generator or random.Random()
        self._tries = 0

    def next(self) -> float:
        """Return the next wait in seconds: 0.75 to 1.5 times ``first * 2**tries``, at most `cap`."""
        span = min(self._cap, 1.5 * self._first * 2.0**self._tries)
        if span < self._cap:
            self._tries += 1
        return span * self._random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Restart from the first wait."""
        self._tries = 0


class PollPace:
    """Intervals between polls: short while messages arrive, longer the longer none did.

    A server that holds a poll until there is a message (an Espalier edge) is polled again immediately. A server that
    answers immediately (a stock SuperLink) is polled after `share` times the time since the last activity, so the
    delay of a message is at most that share of the pause before it. At a constant 15 ms, the polls of four edges took
    more of a SuperLink's CPU time than all its other work between two windows.

    Parameters
    ----------
    fast, slow : float
        Shortest and longest interval, in seconds.
    share : float
        Interval as a fraction of the time since the last activity.
    held : float
        Duration, in seconds, from which on a poll counts as held by the server.
    """

    def __init__(self, fast: float = 0.015, slow: float = 1.0, share: float = 0.1, held: float = 0.3) -> None:
        self._fast, self._slow, self._share, self._held = fast, slow, share, held
        self._active_at = time.monotonic()

    def activity(self) -> None:
        """Record that a message was received or sent."""
        self._active_at = time.monotonic()

    def after(self, took: float) -> float:
        """Return how many seconds to wait after a poll that took `took` seconds and returned no message."""
        if took >= self._held:
            return 0.0
        idle = time.monotonic() - self._active_at
        return min(self._slow, max(self._fast, self._share * idle))
