"""Estimates of clients' training times, and the round deadline derived from them."""

from __future__ import annotations

from collections.abc import Mapping

from espalier.config.run_settings import RunSettings
from espalier.config.timeouts import LEAST_ROUND

#: A deadline is this multiple of the expected time of the slowest participant.
MARGIN = 3.0
#: Weight of a client's latest time in the moving average of its estimate, if it was faster than expected.
SMOOTHING = 0.3


def work_of(settings: RunSettings, samples: int, numbers: int) -> float:
    """Return the work of a client in a round: samples times parameters of the model that it receives.

    Parameters
    ----------
    settings : RunSettings
        The run's configuration.
    samples : int
        Samples the client holds.
    numbers : int
        Size of the payload; the cost of a sample grows with it.
    """
    trained = settings.local_steps * settings.batch_size or settings.local_epochs * samples
    return float(max(trained, 1)) * max(numbers, 1)


class Pace:
    """Seconds that clients take per unit of work, estimated from previous rounds and their measured speed.

    The measured time is the one that the edge waits: from the start of the round to the arrival of the reply.
    """

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}

    def record(self, client: str, work: float, seconds: float) -> None:
        """Record a client's time for a round: slower times count immediately, faster ones gradually."""
        rate = seconds / work
        previous = self._rates.get(client, rate)
        self._rates[client] = max(rate, previous + SMOOTHING * (rate - previous))

    def record_miss(self, client: str, work: float, deadline: float) -> None:
        """Record that a client missed the deadline, which makes the next one longer, up to the limit."""
        self._rates[client] = max(2.0 * deadline / MARGIN / work, self._rates.get(client, 0.0))

    def deadline(self, works: Mapping[str, float], speeds: Mapping[str, float], limit: float) -> float:
        """Return how many seconds to wait for the replies of a round.

        Parameters
        ----------
        works : mapping of str to float
            The work of each participant, see :func:`work_of`.
        speeds : mapping of str to float
            Measured speed of clients, in any unit they share; absent or 0: not measured.
        limit : float
            Maximum deadline in seconds; it applies while there is no estimate for some participant.

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
