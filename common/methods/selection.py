"""Who trains in a round: sampling, Power-of-Choice and DivFL, asked alike by whoever runs a round.

A round is opened by :meth:`Selection.candidates` (whom to ask) and settled by :meth:`Selection.choose`.
Inside a window the cloud is not there to choose: :meth:`Selection.later` says what edges do by themselves.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from common.methods.planning import Member, pick_clients, pick_count
from common.seeds import rng_for

if TYPE_CHECKING:
    from common.run.config import RunConfig


@dataclass(frozen=True)
class Answer:
    """What a candidate answered to a probe.

    Attributes
    ----------
    metrics : Mapping[str, float]
        Its scalars; "loss" is F_k(w), the mean loss of the model it was sent.
    arrays : Mapping[str, np.ndarray]
        Its tensors; to the probe "gradient", the full-batch gradient of F_k at w by tensor name.
    """

    metrics: Mapping[str, float]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


class Selection(ABC):
    """A rule that picks m = max(1, round(fraction·N)) of N clients.

    Parameters
    ----------
    settings : RunConfig
        The run's configuration.
    """

    #: What candidates are asked: "" nothing, "loss" F_k(w) on all data, "batch-loss" on one random
    #: mini-batch, "gradient" the full-batch gradient.
    probe: ClassVar[str] = ""
    #: The mean that matches the sampling (heterogeneity.md §8): "samples" n_k / Σ n_k, "uniform" 1 / m.
    weighting: ClassVar[str] = "samples"
    #: What every participant adds to its report for `observe`: "" nothing, "gradient" ∇F_k at the
    #: model it received.
    reports: str = ""

    def __init__(self, settings: RunConfig) -> None:
        self.settings = settings

    @abstractmethod
    def candidates(self, round_: int, members: Sequence[Member]) -> list[Member]:
        """Return whom to ask, in the order of their names; without a probe, the picks themselves.

        May be empty although there is a probe: then nobody need be asked, and `choose` follows at once.
        """

    def choose(
        self, round_: int, candidates: Sequence[Member], answers: Mapping[str, Answer]
    ) -> list[Member]:
        """Return who trains, in the order of their names; a candidate that did not answer is out.

        Belongs to the call of `candidates` before it, of the same round.
        """
        return list(candidates)

    def later(self, round_: int, members: Sequence[Member]) -> tuple[list[Member], int]:
        """Return the candidates of a window's second or further round, and how many of them are kept in all.

        0 keeps them all and nobody is asked. Otherwise each edge asks its own candidates for `probe` and
        keeps its part, :func:`shares`, of the largest losses, :func:`top`.
        """
        return self.candidates(round_, members), 0

    def observe(  # noqa: B027 - most rules remember nothing
        self,
        round_: int,
        metrics: Mapping[str, Mapping[str, float]],
        gradients: Mapping[str, Mapping[str, np.ndarray]],
    ) -> None:
        """Take note of what a round's participants reported, by their names.

        Parameters
        ----------
        round_ : int
            The round.
        metrics : Mapping[str, Mapping[str, float]]
            Each participant's scalars; "loss" is its mean training loss over the local steps.
        gradients : Mapping[str, Mapping[str, np.ndarray]]
            Each participant's gradient by tensor name, where `reports` is "gradient".
        """

    def state(self) -> dict[str, np.ndarray]:
        """Return what a checkpoint must keep, keyed by the clients' names."""
        return {}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:  # noqa: B027
        """Take back what `state` returned."""

    def _count(self, members: Sequence[Member]) -> int:
        return pick_count(self.settings.fraction, len(members))


class Uniform(Selection):
    """m clients uniformly without replacement (FedAvg, arXiv 1602.05629); see :func:`pick_clients`."""

    def candidates(self, round_: int, members: Sequence[Member]) -> list[Member]:
        """Return the picks."""
        return pick_clients(members, self.settings.fraction, self.settings.seed, round_)


class Proportional(Selection):
    """m draws with chance n_k / Σ n_k, with replacement (pi_rand of arXiv 2010.01243, §2).

    A client trains once however often it was drawn, so there may be fewer than m participants. The
    unbiased estimate weighs a client by the number of its draws, `draws`; the plain mean over the
    distinct clients is the same wherever no client was drawn twice, and else leans towards small clients.
    """

    weighting = "uniform"

    def draws(self, round_: int, members: Sequence[Member]) -> dict[str, int]:
        """Return how often each picked client was drawn, in the order of names; they add up to m."""
        ordered = _by_name(members)
        rng = rng_for(self.settings.seed, "cloud", round_, "selection")
        drawn = rng.choice(len(ordered), self._count(ordered), p=_proportions(ordered))
        counts = np.bincount(drawn, minlength=len(ordered))
        return {m.name: int(c) for m, c in zip(ordered, counts, strict=True) if c}

    def candidates(self, round_: int, members: Sequence[Member]) -> list[Member]:
        """Return the distinct clients drawn."""
        drawn = self.draws(round_, members)
        return [m for m in _by_name(members) if m.name in drawn]


class Bernoulli(Selection):
    """Each client by its own coin of chance `fraction`, as FedDyn's experiments have it (ICLR 2021).

    If every coin says no, the client that came closest trains.
    """

    def candidates(self, round_: int, members: Sequence[Member]) -> list[Member]:
        """Return the picks: their number is random, of mean fraction·N, at least one."""
        ordered = _by_name(members)
        coins = {m.name: rng_for(self.settings.seed, m.name, round_, "coin").random() for m in ordered}
        lowest = min(coins.values())
        limit = self.settings.fraction
        return [m for m in ordered if coins[m.name] < limit or coins[m.name] == lowest]


class PowerOfChoice(Selection):
    """pi_pow-d (Cho, Wang, Joshi, AISTATS 2022, arXiv 2010.01243, §4).

    d candidates are drawn with chance ∝ n_k without replacement, answer with F_k(w), and the m of the
    largest loss train; the server takes their plain mean. With `adaptive-candidates` (pi_adapow-d) d
    falls over the run, see :func:`adaptive_count`.
    """

    probe = "loss"
    weighting = "uniform"

    def __init__(self, settings: RunConfig) -> None:
        super().__init__(settings)
        self._keep = 1

    def candidates(self, round_: int, members: Sequence[Member]) -> list[Member]:
        """Return the d candidates; fewer only if fewer have any samples."""
        self._keep = self._count(members)
        return self._draw(round_, members)

    def choose(
        self, round_: int, candidates: Sequence[Member], answers: Mapping[str, Answer]
    ) -> list[Member]:
        """Return the m candidates of the largest loss, ties by name."""
        losses = {
            m.name: answers[m.name].metrics["loss"]
            for m in candidates
            if m.name in answers and "loss" in answers[m.name].metrics
        }
        chosen = set(top(losses, self._keep))
        return [m for m in _by_name(candidates) if m.name in chosen]

    def later(self, round_: int, members: Sequence[Member]) -> tuple[list[Member], int]:
        """Return d candidates of whom the edges keep m; if d = m there is nothing to ask."""
        found, keep = self._draw(round_, members), self._count(members)
        return found, keep if len(found) > keep else 0

    def _draw(self, round_: int, members: Sequence[Member]) -> list[Member]:
        ordered, keep = _by_name(members), self._count(members)
        chances = _proportions(ordered)
        wanted = self._candidate_count(round_, len(ordered), keep)
        rng = rng_for(self.settings.seed, "cloud", round_, "selection")
        # Without replacement nobody without samples can be drawn, so d is at most who has some.
        size = min(wanted, int(np.count_nonzero(chances)))
        drawn = rng.choice(len(ordered), size, replace=False, p=chances)
        return [ordered[i] for i in sorted(drawn)]

    def _candidate_count(self, round_: int, population: int, keep: int) -> int:
        s = self.settings
        if s.adaptive_candidates:
            return adaptive_count(round_, s.rounds, population, keep)
        return min(max(s.candidates or 2 * keep, keep), population)


class BatchPowerOfChoice(PowerOfChoice):
    """pi_cpow-d (arXiv 2010.01243, §4): candidates estimate F_k(w) on one random mini-batch."""

    probe = "batch-loss"


class RememberedPowerOfChoice(PowerOfChoice):
    """pi_rpow-d (arXiv 2010.01243, §4): nobody is asked.

    Candidates are ranked by the mean training loss of their last participation; a client never seen
    counts as infinite, so it comes first, and such ties are settled by a seeded draw.
    """

    probe = ""

    def __init__(self, settings: RunConfig) -> None:
        super().__init__(settings)
        self._losses: dict[str, float] = {}

    def candidates(self, round_: int, members: Sequence[Member]) -> list[Member]:
        """Return the picks."""

        def rank(member: Member) -> tuple[float, float]:
            loss = self._losses.get(member.name, math.inf)
            return -loss, float(rng_for(self.settings.seed, member.name, round_, "selection-tie").random())

        return _by_name(sorted(self._draw(round_, members), key=rank)[: self._count(members)])

    def choose(
        self, round_: int, candidates: Sequence[Member], answers: Mapping[str, Answer]
    ) -> list[Member]:
        """Return the picks: they were not asked."""
        return list(candidates)

    def later(self, round_: int, members: Sequence[Member]) -> tuple[list[Member], int]:
        """Return picks by what the cloud knows at the window's start; all of them train."""
        return self.candidates(round_, members), 0

    def observe(
        self,
        round_: int,
        metrics: Mapping[str, Mapping[str, float]],
        gradients: Mapping[str, Mapping[str, np.ndarray]],
    ) -> None:
        """Remember the participants' mean training losses."""
        for name, found in metrics.items():
            if "loss" in found and not math.isnan(found["loss"]):
                self._losses[name] = float(found["loss"])

    def state(self) -> dict[str, np.ndarray]:
        """Return "loss/NAME" for each client seen, shape (1,)."""
        return {f"loss/{name}": np.array([loss]) for name, loss in sorted(self._losses.items())}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take back the losses."""
        self._losses = {
            key.removeprefix("loss/"): float(value[0])
            for key, value in state.items()
            if key.startswith("loss/")
        }


def create_selection(settings: RunConfig, name: str) -> Selection:
    """Return the selection of a name.

    Parameters
    ----------
    settings : RunConfig
        The run's configuration.
    name : str
        `selection`, with "auto" resolved by the method.

    Raises
    ------
    ValueError
        If there is no selection of that name.
    """
    if name == "divfl":
        from common.methods.facility import DivFL  # it builds on this module

        return DivFL(settings)
    rules: dict[str, type[Selection]] = {
        "uniform": Uniform,
        "proportional": Proportional,
        "bernoulli": Bernoulli,
        "pow-d": PowerOfChoice,
        "cpow-d": BatchPowerOfChoice,
        "rpow-d": RememberedPowerOfChoice,
    }
    if name not in rules:
        raise ValueError(f"no selection is called {name!r}")
    return rules[name](settings)


def adaptive_count(round_: int, rounds: int, population: int, keep: int) -> int:
    """Return d of pi_adapow-d: it starts at N and is halved until it is m (arXiv 2010.01243, §4).

    The paper leaves open when; here every value of d, N, ⌈N/2⌉, ⌈N/4⌉, …, m, holds for an equal part of
    the run: with S values, round r = 1 … R has the value number ⌊(r − 1)·S / R⌋.

    Parameters
    ----------
    round_, rounds : int
        The round r and the rounds in all, R.
    population, keep : int
        N and m.
    """
    values = [population]
    while values[-1] > keep:
        values.append(max(keep, -(-values[-1] // 2)))
    return values[min((round_ - 1) * len(values) // rounds, len(values) - 1)]


def top(losses: Mapping[str, float], m: int) -> list[str]:
    """Return the names of the m largest losses, largest first, ties by name; NaN comes last.

    An edge and the cloud call the same function, so they choose alike.
    """
    return sorted(losses, key=lambda n: (math.inf if math.isnan(losses[n]) else -losses[n], n))[:m]


def shares(counts: Mapping[str, int], m: int) -> dict[str, int]:
    """Split m among edges in proportion to their candidates: largest remainders of m·d_e / d.

    Parameters
    ----------
    counts : Mapping[str, int]
        d_e, candidates of each edge.
    m : int
        How many candidates are kept in all.

    Returns
    -------
    dict of str to int
        m_e ≤ d_e of each edge; they add up to min(m, d). Equal remainders go by the edges' names.
    """
    total = sum(counts.values())
    if m >= total:
        return dict(counts)
    parts = {edge: m * count // total for edge, count in counts.items()}
    order = sorted(counts, key=lambda edge: (-(m * counts[edge] % total), edge))
    for edge in order[: m - sum(parts.values())]:
        parts[edge] += 1
    return parts


def _by_name(members: Sequence[Member]) -> list[Member]:
    return sorted(members, key=lambda m: m.name)


def _proportions(ordered: Sequence[Member]) -> np.ndarray:
    """Return p_k = n_k / Σ n_k, uniform where nobody has a sample."""
    counts = np.array([m.samples for m in ordered], dtype=np.float64)
    total = counts.sum()
    return counts / total if total > 0 else np.full(len(ordered), 1.0 / len(ordered))
