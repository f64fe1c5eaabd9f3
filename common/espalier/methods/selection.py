"""Client selection: the interface of selection rules, random sampling, and the registry of rules by name.

A round starts with :meth:`Selection.candidates`, the clients to ask, and :meth:`Selection.choose` returns the
participants. Between the rounds of a window the cloud cannot choose: :meth:`Selection.later` says what edges
choose from. Rules of single methods are in the methods' modules, which register them by
:func:`register_selection`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import Field

from espalier.config.fields import SettingsGroup
from espalier.methods.planning import Member, pick_clients, pick_count
from espalier.seeds import rng_for

if TYPE_CHECKING:
    from espalier.config.run_settings import RunSettings
    from espalier.training.objectives import Objective


class SelectionSettings(SettingsGroup):
    """Which clients train in a round, and their weights in a mean."""

    selection: Literal[
        "auto", "uniform", "proportional", "bernoulli", "pow-d", "cpow-d", "rpow-d", "divfl"
    ] = Field(default="auto", description="which clients train in a round; auto: the method's rule")
    weighting: Literal["auto", "samples", "uniform"] = Field(
        default="auto", description="a client's weight in a mean; auto: that of the method or the selection"
    )


@dataclass(frozen=True)
class Answer:
    """A candidate's answer to a probe.

    Attributes
    ----------
    metrics : Mapping[str, float]
        Scalars; "loss" is F_k(w), the mean loss of the received model w.
    arrays : Mapping[str, np.ndarray]
        Tensors; for the probe "gradient", the full-batch gradient of F_k at w by tensor name.
    """

    metrics: Mapping[str, float]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


class Selection(ABC):
    """A rule that chooses m = max(1, round(fraction·N)) of N clients.

    Parameters
    ----------
    settings : RunSettings
        The run's configuration.
    """

    #: Inquiry to the candidates: "" none, "loss" F_k(w) on all data, "batch-loss" on one random mini-batch,
    #: "gradient" the full-batch gradient.
    probe: ClassVar[str] = ""
    #: Groups of settings of the rule.
    uses: ClassVar[tuple[type[SettingsGroup], ...]] = ()
    #: Weights of the mean that match the sampling: "samples" n_k / Σ n_k, "uniform" 1 / m.
    weighting: ClassVar[str] = "samples"
    #: What every participant reports for `observe`: "" nothing more, "gradient" ∇F_k at the received model.
    reports: str = ""

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings

    def measurement(self) -> Objective | None:
        """Return the term that makes participants report what `reports` names; None for none."""
        return None

    @abstractmethod
    def candidates(self, round_: int, members: Sequence[Member]) -> list[Member]:
        """Return the clients to ask, in the order of their names; without a probe, the participants.

        May be empty although there is a probe: then no inquiry is needed, and `choose` is called next.
        """

    def choose(
        self, round_: int, candidates: Sequence[Member], answers: Mapping[str, Answer]
    ) -> list[Member]:
        """Return the participants in the order of their names, without candidates that did not answer.

        Called after `candidates` of the same round.
        """
        return list(candidates)

    def later(self, round_: int, members: Sequence[Member]) -> tuple[list[Member], int]:
        """Return the candidates of a further round of a window, and how many of them participate in total.

        0 means that all participate without an inquiry. Otherwise each edge sends the inquiry `probe` to its own
        candidates and chooses its share, :func:`shares`, with the largest losses, :func:`top`.
        """
        return self.candidates(round_, members), 0

    def observe(  # noqa: B027 - most rules have no state
        self,
        round_: int,
        metrics: Mapping[str, Mapping[str, float]],
        gradients: Mapping[str, Mapping[str, np.ndarray]],
    ) -> None:
        """Process what a round's participants reported.

        Parameters
        ----------
        round_ : int
            The round.
        metrics : Mapping[str, Mapping[str, float]]
            Each participant's scalars; "loss" is its mean training loss over the local steps.
        gradients : Mapping[str, Mapping[str, np.ndarray]]
            Each participant's gradient by tensor name, where `reports` is "gradient".
        """

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """Return the state that a checkpoint stores: parts by name, arrays in them by client."""
        return {}

    def restore(self, state: Mapping[str, Mapping[str, np.ndarray]]) -> None:  # noqa: B027
        """Restore what `state` returned."""

    def _count(self, members: Sequence[Member]) -> int:
        return pick_count(self.settings.fraction, len(members))


_Rule = TypeVar("_Rule", bound=type[Selection])

#: The selections by name, as in `-c selection=…`.
SELECTIONS: dict[str, type[Selection]] = {}


def register_selection(name: str) -> Callable[[_Rule], _Rule]:
    """Return a class decorator that registers a selection under a name.

    :mod:`espalier.methods.registry` imports all modules that register one.
    """

    def register(rule: _Rule) -> _Rule:
        SELECTIONS[name] = rule
        return rule

    return register


@register_selection("uniform")
class Uniform(Selection):
    """m clients uniformly without replacement (FedAvg, arXiv 1602.05629); see :func:`pick_clients`."""

    def candidates(self, round_: int, members: Sequence[Member]) -> list[Member]:
        """Return the participants."""
        return pick_clients(members, self.settings.fraction, self.settings.seed, round_)


@register_selection("proportional")
class Proportional(Selection):
    """m draws with probability n_k / Σ n_k, with replacement (pi_rand of arXiv 2010.01243, §2).

    A client trains once however often it was drawn, so there may be fewer than m participants. The unbiased
    estimate weights a client by the number of its draws, `draws`; the plain mean over distinct clients is equal to
    it if no client was drawn twice, and is otherwise biased towards small clients.
    """

    weighting = "uniform"

    def draws(self, round_: int, members: Sequence[Member]) -> dict[str, int]:
        """Return the number of draws of each drawn client, in the order of names; they add up to m."""
        ordered = by_name(members)
        rng = rng_for(self.settings.seed, "cloud", round_, "selection")
        drawn = rng.choice(len(ordered), self._count(ordered), p=proportions(ordered))
        counts = np.bincount(drawn, minlength=len(ordered))
        return {m.name: int(c) for m, c in zip(ordered, counts, strict=True) if c}

    def candidates(self, round_: int, members: Sequence[Member]) -> list[Member]:
        """Return the distinct clients drawn."""
        drawn = self.draws(round_, members)
        return [m for m in by_name(members) if m.name in drawn]


@register_selection("bernoulli")
class Bernoulli(Selection):
    """Each client participates independently with probability `fraction`, as in FedDyn's experiments (ICLR 2021).

    If none would, the client with the smallest random number does.
    """

    def candidates(self, round_: int, members: Sequence[Member]) -> list[Member]:
        """Return the participants: their number is random with mean fraction·N, at least one."""
        ordered = by_name(members)
        coins = {m.name: rng_for(self.settings.seed, m.name, round_, "coin").random() for m in ordered}
        lowest = min(coins.values())
        limit = self.settings.fraction
        return [m for m in ordered if coins[m.name] < limit or coins[m.name] == lowest]


def create_selection(settings: RunSettings, name: str) -> Selection:
    """Return the selection registered under a name.

    Parameters
    ----------
    settings : RunSettings
        The run's configuration.
    name : str
        `selection`, with "auto" resolved by the method.

    Raises
    ------
    ValueError
        If no selection is registered under the name.
    """
    if name not in SELECTIONS:
        raise ValueError(f"no selection is called {name!r}")
    return SELECTIONS[name](settings)


def top(losses: Mapping[str, float], m: int) -> list[str]:
    """Return the names of the m largest losses, largest first, ties by name; NaN comes last.

    Edges and the cloud call the same function, so they choose in the same way.
    """
    return sorted(losses, key=lambda n: (math.inf if math.isnan(losses[n]) else -losses[n], n))[:m]


def shares(counts: Mapping[str, int], m: int) -> dict[str, int]:
    """Split m among edges in proportion to their candidates: largest remainders of m·d_e / d.

    Parameters
    ----------
    counts : Mapping[str, int]
        d_e, candidates of each edge.
    m : int
        Number of participants in total.

    Returns
    -------
    dict of str to int
        m_e ≤ d_e of each edge; they add up to min(m, d). Ties of remainders are broken by the edges' names.
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
    """Return p_k = n_k / Σ n_k; uniform if there are no samples."""
    counts = np.array([m.samples for m in ordered], dtype=np.float64)
    total = counts.sum()
    return counts / total if total > 0 else np.full(len(ordered), 1.0 / len(ordered))
