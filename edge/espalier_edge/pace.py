"""Estimates of clients' training times, and the round deadline derived from them."""

from __future__ import annotations

from collections.abc import Mapping

from espalier.config.run_settings import RunSettings
from espalier.config.timeouts import LEAST_ROUND

#: A deadline is this multiple of the expected time of the slowest participant.
MARGIN = 3.0
#: Weight of a client's newest time in its estimate, if it was faster than expected.
NEWEST = 0.3


def work_of(settings: RunSettings, samples: int, numbers: int) -> float:
    """Return the work of a client in a round: samples times parameters of the model that it receives.

    Parameters
    ----------
    settings : RunSettings
        The run's configuration.
    samples : int
        Samples the client holds.
    numbers : int
        Length of the payload; what a sample costs grows with it.
    """
    passed = settings.local_steps * settings.batch_size or settings.local_epochs * samples
    return float(max(passed, 1)) * max(numbers, 1)


class Pace:
    """Seconds that clients take per unit of work, estimated from previous rounds and their measured speed.

    What is measured is what the edge waits for: from a round's beginning to the reply's arrival.
    """

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}

    def took(self, client: str, work: float, seconds: float) -> None:
        """Record a client's time for a round: slower times count immediately, faster ones gradually."""
        rate = seconds / work
        former = self._rates.get(client, rate)
        self._rates[client] = max(rate, former + NEWEST * (rate - former))

    def missed(self, client: str, work: float, deadline: float) -> None:
        """Record that a client missed the deadline: its next one is longer, up to the limit."""
        self._rates[client] = max(2.0 * deadline / MARGIN / work, self._rates.get(client, 0.0))

    def deadline(self, works: Mapping[str, float], speeds: Mapping[str, float], limit: float) -> float:
        """Return how many seconds to wait for the replies of a round.

        Parameters
        ----------
        works : mapping of str to float
            What each participant has to do.
        speeds : mapping of str to float
            Measured speed of clients, in any unit they share; absent or 0: not measured.
        limit : float
            The longest deadline, in seconds; the deadline while nothing is known of some participant.

        Returns
        -------
        float
            Seconds: `MARGIN` times the longest expected time, at least `LEAST_ROUND`, at most `limit`.
        """
        expected = [self._rate(client, speeds) for client in works]
        if not expected or None in expected:
            return limit
        longest = max(rate * work for rate, work in zip(expected, works.values(), strict=True) if rate)
        return min(limit, max(LEAST_ROUND, MARGIN * longest))

    def _rate(self, client: str, speeds: Mapping[str, float]) -> float | None:
        """Return a client's seconds per unit of work; for a new client, scaled from others by measured speed."""
        if client in self._rates:
            return self._rates[client]
        speed = speeds.get(client, 0.0)
        costs = [rate * speeds[c] for c, rate in self._rates.items() if speeds.get(c, 0.0) > 0]
        return max(costs) / speed if costs and speed > 0 else None
