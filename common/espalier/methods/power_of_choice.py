"""Power-of-Choice: clients of largest loss train (Cho, Wang, Joshi, AISTATS 2022, arXiv 2010.01243)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from espalier.config.fields import Count, SettingsGroup
from espalier.methods.fedavg import FedAvg
from espalier.methods.planning import Member
from espalier.methods.selection import (
    Answer,
    Selection,
    by_name,
    proportions,
    register_selection,
    top,
)
from espalier.seeds import rng_for

if TYPE_CHECKING:
    from espalier.config.run_settings import RunSettings


class PowerOfChoice(FedAvg):
    """FedAvg over the m of d candidates with the largest loss.

    Candidates are sampled ∝ n_k, so the mean over the participants is not weighted. `selection` = cpow-d, rpow-d and
    `adaptive-candidates` are the paper's variants.
    """

    name = "power-of-choice"
    own_selection = "pow-d"


@register_selection("pow-d")
class PowD(Selection):
    """pi_pow-d (§4).

    d candidates are sampled ∝ n_k without replacement and answer with F_k(w); the m of the largest loss train. With
    `adaptive-candidates` (pi_adapow-d) d decreases over the run, see :func:`adaptive_count`. `loss-weight=samples`,
    which is not the paper's, ranks by a client's share p_k F_k of the global loss instead.
    """

    class Settings(SettingsGroup):
        """The number of candidates and their ranking."""

        candidates: Count = Field(
            default=0,
            description="d, the number of clients asked for their loss; 0: twice the number that train",
        )
        adaptive_candidates: bool = Field(
            default=False,
            description="d is halved from all clients to the number that train over the run (adapow-d)",
        )
        loss_weight: Literal["none", "samples"] = Field(
            default="none", description="rank candidates by F_k, or by n_k F_k"
        )

    probe = "loss"
    weighting = "uniform"
    uses = (Settings,)

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        self._keep = 1

    def candidates(self, round_: int, members: Sequence[Member]) -> list[Member]:
        """Return the d candidates, or fewer if fewer have samples."""
        self._keep = self._count(members)
        return self._draw(round_, members)

    def choose(
        self, round_: int, candidates: Sequence[Member], answers: Mapping[str, Answer]
    ) -> list[Member]:
        """Return the m candidates of the largest loss, ties by name."""
        losses = {
            m.name: rating(self.settings.of(PowD.Settings), answers[m.name].metrics["loss"], m.samples)
            for m in candidates
            if m.name in answers and "loss" in answers[m.name].metrics
        }
        chosen = set(top(losses, self._keep))
        return [m for m in by_name(candidates) if m.name in chosen]

    def later(self, round_: int, members: Sequence[Member]) -> tuple[list[Member], int]:
        """Return d candidates, of which edges choose m; if d = m they are not asked."""
        found, keep = self._draw(round_, members), self._count(members)
        return found, keep if len(found) > keep else 0

    def _draw(self, round_: int, members: Sequence[Member]) -> list[Member]:
        ordered, keep = by_name(members), self._count(members)
        chances = proportions(ordered)
        wanted = self._candidate_count(round_, len(ordered), keep)
        rng = rng_for(self.settings.seed, "cloud", round_, "selection")
        # Without replacement d is at most the number of clients with samples.
        size = min(wanted, int(np.count_nonzero(chances)))
        drawn = rng.choice(len(ordered), size, replace=False, p=chances)
        return [ordered[i] for i in sorted(drawn)]

    def _candidate_count(self, round_: int, population: int, keep: int) -> int:
        s = self.settings.of(PowD.Settings)
        if s.adaptive_candidates:
            return adaptive_count(round_, self.settings.rounds, population, keep)
        return min(max(s.candidates or 2 * keep, keep), population)


@register_selection("cpow-d")
class BatchPowD(PowD):
    """pi_cpow-d (§4): candidates estimate F_k(w) on one random mini-batch."""

    probe = "batch-loss"


@register_selection("rpow-d")
class StalePowD(PowD):
    """pi_rpow-d (§4): candidates are not asked.

    They are ranked by the mean training loss of their last participation. The loss of a client that never participated
    counts as infinite, so it comes first; such ties are broken by a seeded draw.
    """

    probe = ""

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        self._losses: dict[str, float] = {}

    def candidates(self, round_: int, members: Sequence[Member]) -> list[Member]:
        """Return the chosen clients."""

        def rank(member: Member) -> tuple[float, float]:
            loss = self._losses.get(member.name, math.inf)
            return -rating(self.settings.of(PowD.Settings), loss, member.samples), float(
                rng_for(self.settings.seed, member.name, round_, "selection-tie").random()
            )

        return by_name(sorted(self._draw(round_, members), key=rank)[: self._count(members)])

    def choose(
        self, round_: int, candidates: Sequence[Member], answers: Mapping[str, Answer]
    ) -> list[Member]:
        """Return the chosen clients, which were not asked."""
        return list(candidates)

    def later(self, round_: int, members: Sequence[Member]) -> tuple[list[Member], int]:
        """Return clients chosen by the losses known at the window's start; all of them train."""
        return self.candidates(round_, members), 0

    def observe(
        self,
        round_: int,
        metrics: Mapping[str, Mapping[str, float]],
        gradients: Mapping[str, Mapping[str, np.ndarray]],
    ) -> None:
        """Store the participants' mean training losses."""
        for name, found in metrics.items():
            if "loss" in found and not math.isnan(found["loss"]):
                self._losses[name] = float(found["loss"])

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """Return in "loss" the loss, shape (1,), of each client that participated."""
        losses = {name: np.array([loss]) for name, loss in sorted(self._losses.items())}
        return {"loss": losses} if losses else {}

    def restore(self, state: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Restore the losses."""
        self._losses = {name: float(loss[0]) for name, loss in state.get("loss", {}).items()}


def rating(settings: PowD.Settings, loss: float, samples: int) -> float:
    """Return the score of a candidate.

    Parameters
    ----------
    settings : PowD.Settings
        `loss-weight` chooses F_k ("none") or n_k F_k ("samples"), which ranks as p_k F_k.
    loss : float
        F_k, the mean loss of the client.
    samples : int
        n_k, its number of samples.
    """
    return loss * samples if settings.loss_weight == "samples" else loss


def adaptive_count(round_: int, rounds: int, population: int, keep: int) -> int:
    """Return d of pi_adapow-d: it starts at N and is halved until it is m (§4).

    The paper does not say when. Here each value of d, N, ⌈N/2⌉, ⌈N/4⌉, …, m, is used for an equal part of the run: with
    S values, round r = 1 … R has value number ⌊(r − 1)·S / R⌋.

    Parameters
    ----------
    round_, rounds : int
        The round r and the total number of rounds R.
    population, keep : int
        N and m.
    """
    values = [population]
    while values[-1] > keep:
        values.append(max(keep, -(-values[-1] // 2)))
    return values[min((round_ - 1) * len(values) // rounds, len(values) - 1)]
