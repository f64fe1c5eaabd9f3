"""Who trains in each round of a window, and at which edge: drawn ahead at the cloud (DESIGN §2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from common.homogeneity import Form, edge_probabilities, sh_score
from common.seeds import rng_for


@dataclass(frozen=True)
class Member:
    """A client that can take part.

    Attributes
    ----------
    name : str
        Its name, unique in the tree.
    samples : int
        Training samples it holds.
    labels : np.ndarray
        Label counts, shape (classes,); noisy where `histogram-noise` is on.
    edges : tuple[str, ...]
        Edges it is connected to, sorted.
    """

    name: str
    samples: int
    labels: np.ndarray
    edges: tuple[str, ...]


#: One round: client name -> edge name, in the order of the client names.
Round = dict[str, str]


class EdgeChoice(Protocol):
    """Which edge a client goes to in a round."""

    def probabilities(self, member: Member, loads: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the chance of each of the member's edges.

        Parameters
        ----------
        member : Member
            The client that draws.
        loads : Mapping[str, np.ndarray]
            Label counts accumulated at each edge since the last central aggregation.
        """


@dataclass(frozen=True)
class ByHomogeneity:
    """FedPhD's rule p_e ∝ ReLU(a·mu(q'_e) − n_e + b) (arXiv 2507.06449, Algorithm 1)."""

    a: float
    b: float
    form: Form = "root"

    def probabilities(self, member: Member, loads: Mapping[str, np.ndarray]) -> np.ndarray:
        """See :func:`common.homogeneity.edge_probabilities`."""
        return edge_probabilities(
            member.labels, [loads[e] for e in member.edges], a=self.a, b=self.b, form=self.form
        )


class AtRandom:
    """Every edge in reach is equally likely: the control for :class:`ByHomogeneity`."""

    def probabilities(self, member: Member, loads: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the uniform distribution."""
        return np.full(len(member.edges), 1.0 / len(member.edges))


class Fixed:
    """A client stays at one of the edges it reaches; its name settles which, so clients spread over them."""

    def probabilities(self, member: Member, loads: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return a one-hot distribution."""
        chosen = int(rng_for(0, member.name, 0, "fixed-edge").integers(len(member.edges)))
        chances = np.zeros(len(member.edges))
        chances[chosen] = 1.0
        return chances


def pick_clients(members: Sequence[Member], fraction: float, seed: int, round_: int) -> list[Member]:
    """Pick max(1, round(fraction·N)) clients uniformly without replacement, in the order of their names.

    The draw depends on the run seed and the round alone, so every method sees the same picks.
    """
    ordered = sorted(members, key=lambda m: m.name)
    count = max(1, round(fraction * len(ordered)))
    chosen = rng_for(seed, "cloud", round_, "selection").choice(len(ordered), count, replace=False)
    return [ordered[i] for i in sorted(chosen)]


def plan_window(
    members: Sequence[Member],
    choice: EdgeChoice,
    *,
    first_round: int,
    rounds: int,
    fraction: float,
    seed: int,
) -> list[Round]:
    """Draw a whole window: the picks of each round and every picked client's edge.

    All clients of a round draw against the same edge loads; the loads grow with the round's
    clients afterwards, and start empty because a window follows a central aggregation.

    Parameters
    ----------
    members : sequence of Member
        Clients that can take part; each reaches at least one edge.
    choice : EdgeChoice
        The rule.
    first_round, rounds : int
        The window's rounds are first_round .. first_round + rounds - 1.
    fraction : float
        Share of the clients picked per round.
    seed : int
        The run's seed.

    Returns
    -------
    list of Round
        One assignment a round.
    """
    loads = {e: np.zeros_like(m.labels, dtype=np.float64) for m in members for e in m.edges}
    plan = []
    for round_ in range(first_round, first_round + rounds):
        picked = pick_clients(members, fraction, seed, round_)
        assignment: Round = {}
        for member in picked:
            chances = choice.probabilities(member, loads)
            draw = rng_for(seed, member.name, round_, "edge").choice(len(member.edges), p=chances)
            assignment[member.name] = member.edges[int(draw)]
        for member in picked:
            loads[assignment[member.name]] = loads[assignment[member.name]] + member.labels
        plan.append(assignment)
    return plan


def mean_homogeneity(plan: Sequence[Round], members: Sequence[Member], form: Form = "root") -> float:
    """Return the mean SH score over the edges that a plan gives clients to."""
    by_name = {m.name: m for m in members}
    loads: dict[str, np.ndarray] = {}
    for assignment in plan:
        for client, edge in assignment.items():
            labels = by_name[client].labels.astype(np.float64)
            loads[edge] = loads[edge] + labels if edge in loads else labels
    return float(np.mean([sh_score(q, form) for q in loads.values()])) if loads else 2.0
