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

from espalier.methods.planning import Member, pick_clients, pick_count
from espalier.seeds import rng_for

if TYPE_CHECKING:
    from espalier.config.run_config import RunConfig


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
        ordered = by_name(members)
        rng = rng_for(self.settings.seed, "cloud", round_, "selection")
        drawn = rng.choice(len(ordered), self._count(ordered), p=proportions(ordered))
        counts = np.bincount(drawn, minlength=len(ordered))
        return {m.name: int(c) for m, c in zip(ordered, counts, strict=True) if c}

    def candidates(self, round_: int, members: Sequence[Member]) -> list[Member]:
        """Return the distinct clients drawn."""
        drawn = self.draws(round_, members)
        return [m for m in by_name(members) if m.name in drawn]


class Bernoulli(Selection):
    """Each client by its own coin of chance `fraction`, as FedDyn's experiments have it (ICLR 2021).

    If every coin says no, the client that came closest trains.
    """

    def candidates(self, round_: int, members: Sequence[Member]) -> list[Member]:
        """Return the picks: their number is random, of mean fraction·N, at least one."""
        ordered = by_name(members)
        coins = {m.name: rng_for(self.settings.seed, m.name, round_, "coin").random() for m in ordered}
        lowest = min(coins.values())
        limit = self.settings.fraction
        return [m for m in ordered if coins[m.name] < limit or coins[m.name] == lowest]


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
    # These build on this module.
    from espalier.methods import power_of_choice as power
    from espalier.methods.facility import DivFL

    rules: dict[str, type[Selection]] = {
        "uniform": Uniform,
        "proportional": Proportional,
        "bernoulli": Bernoulli,
        "pow-d": power.PowerOfChoice,
        "cpow-d": power.BatchPowerOfChoice,
        "rpow-d": power.RememberedPowerOfChoice,
        "divfl": DivFL,
    }
    if name not in rules:
        raise ValueError(f"no selection is called {name!r}")
    return rules[name](settings)


def rating(settings: RunConfig, loss: float, samples: int) -> float:
    """Return what a candidate is ranked by: F_k, or with `loss-weight=samples` n_k F_k, which ranks as p_k F_k."""
    return loss * samples if settings.loss_weight == "samples" else loss


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


def by_name(members: Sequence[Member]) -> list[Member]:
    """Return the members in the order of their names."""
    return sorted(members, key=lambda m: m.name)


def proportions(ordered: Sequence[Member]) -> np.ndarray:
    """Return p_k = n_k / Σ n_k, uniform where nobody has a sample."""
    counts = np.array([m.samples for m in ordered], dtype=np.float64)
    total = counts.sum()
    return counts / total if total > 0 else np.full(len(ordered), 1.0 / len(ordered))
