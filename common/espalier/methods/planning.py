"""Participants and their edges: the cloud plans all rounds of a window in advance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from pydantic import Field

from espalier.config.fields import SettingsGroup
from espalier.methods.homogeneity import Form, edge_probabilities, sh_score
from espalier.seeds import rng_for


class EdgeChoiceSettings(SettingsGroup):
    """How a client's edge is chosen."""

    edge_choice: Literal["auto", "homogeneity", "random", "fixed", "shape"] = Field(
        default="auto", description="how a client's edge is chosen; auto: the method's rule"
    )


@dataclass(frozen=True)
class Member:
    """A client that can participate.

    Attributes
    ----------
    name : str
        Its name, unique in the tree.
    samples : int
        Training samples it holds.
    labels : np.ndarray
        Label counts, shape (classes,); noisy with `histogram-epsilon`.
    edges : tuple[str, ...]
        Edges that it is connected to, sorted.
    level : float
        Size of the sub-model configured at the device, a share in (0, 1]; 0: not set.
    memory : int
        Bytes of memory for training; 0: unknown.
    speed : float
        Measured speed in a unit common to all clients; 0: not measured.
    model : str
        The network that the client trains if it has its own; empty: not set.
    links : Mapping[str, float]
        Latency to each edge in seconds, by the edge's name; an edge without an entry was not measured.
    """

    name: str
    samples: int
    labels: np.ndarray
    edges: tuple[str, ...]
    level: float = 0.0
    memory: int = 0
    speed: float = 0.0
    model: str = ""
    links: Mapping[str, float] = field(default_factory=dict)


#: One round: client name -> edge name, in the order of the client names.
Round = dict[str, str]


class EdgeChoice(Protocol):
    """A rule that assigns the participants of a round to edges."""

    def assign(
        self,
        picked: Sequence[Member],
        members: Sequence[Member],
        loads: Mapping[str, np.ndarray],
        seed: int,
        round_: int,
    ) -> Round:
        """Assign every participant to one of the edges that it reaches.

        Parameters
        ----------
        picked : sequence of Member
            Participants of the round, in the order of their names.
        members : sequence of Member
            All clients that can participate.
        loads : Mapping[str, np.ndarray]
            Label counts accumulated at each edge since the last central aggregation, shape (classes,).
        seed, round_ : int
            The run's seed and the round.

        Returns
        -------
        Round
            The edge of each participant, in their order.
        """


class DrawnEdge(ABC):
    """A rule that samples the edge of each participant independently, given the loads at the start of the round."""

    @abstractmethod
    def probabilities(self, member: Member, loads: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the probability of each of the member's edges, shape (len(member.edges),).

        Parameters
        ----------
        member : Member
            The client.
        loads : Mapping[str, np.ndarray]
            Label counts accumulated at each edge since the last central aggregation.
        """

    def assign(
        self,
        picked: Sequence[Member],
        members: Sequence[Member],
        loads: Mapping[str, np.ndarray],
        seed: int,
        round_: int,
    ) -> Round:
        """Sample an edge for every participant; see :class:`EdgeChoice`."""
        assignment: Round = {}
        for member in picked:
            chances = self.probabilities(member, loads)
            draw = rng_for(seed, member.name, round_, "edge").choice(len(member.edges), p=chances)
            assignment[member.name] = member.edges[int(draw)]
        return assignment


class HomogeneitySettings(SettingsGroup):
    """The constants of the edge choice by homogeneity."""

    selection_a: float = Field(
        default=10000.0, description="a of the edge choice, p_e ~ ReLU(a mu - n_e + b)"
    )
    selection_b: float = Field(default=0.0, description="b of the edge choice")


@dataclass(frozen=True)
class ByHomogeneity(DrawnEdge):
    """FedPhD's rule p_e ∝ ReLU(a·mu(q'_e) − n_e + b) (arXiv 2507.06449, Algorithm 1)."""

    a: float
    b: float
    form: Form = "root"

    def probabilities(self, member: Member, loads: Mapping[str, np.ndarray]) -> np.ndarray:
        """See :func:`espalier.methods.homogeneity.edge_probabilities`."""
        return edge_probabilities(
            member.labels, [loads[e] for e in member.edges], a=self.a, b=self.b, form=self.form
        )


class AtRandom(DrawnEdge):
    """All reachable edges are equally likely: the baseline of :class:`ByHomogeneity`."""

    def probabilities(self, member: Member, loads: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the uniform distribution."""
        return np.full(len(member.edges), 1.0 / len(member.edges))


class Fixed(DrawnEdge):
    """A client always uses the same edge, sampled with its name as seed, so that clients spread over the edges."""

    def probabilities(self, member: Member, loads: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return a one-hot distribution."""
        chosen = int(rng_for(0, member.name, 0, "fixed-edge").integers(len(member.edges)))
        chances = np.zeros(len(member.edges))
        chances[chosen] = 1.0
        return chances


def pick_count(fraction: float, population: int) -> int:
    """Return m = max(1, round(fraction·N)), the number of participants of N clients."""
    return max(1, round(fraction * population))


def pick_clients(members: Sequence[Member], fraction: float, seed: int, round_: int) -> list[Member]:
    """Sample max(1, round(fraction·N)) clients uniformly without replacement, in the order of their names.

    The sample depends on the run's seed and the round alone, so it is the same for all methods.
    """
    ordered = sorted(members, key=lambda m: m.name)
    count = pick_count(fraction, len(ordered))
    chosen = rng_for(seed, "cloud", round_, "selection").choice(len(ordered), count, replace=False)
    return [ordered[i] for i in sorted(chosen)]


def plan_window(
    picks: Sequence[Sequence[Member]],
    members: Sequence[Member],
    choice: EdgeChoice,
    *,
    first_round: int,
    seed: int,
    sticky_edge: bool = False,
) -> list[Round]:
    """Assign the participants of all rounds of a window to edges.

    All participants of a round choose by the same edge loads, to which the round's participants are added
    afterwards. The loads start at zero, because a window follows a central aggregation.

    Parameters
    ----------
    picks : sequence of sequences of Member
        Participants of each round of the window, or the candidates from which edges choose.
    members : sequence of Member
        Clients that can participate; each reaches at least one edge.
    choice : EdgeChoice
        The rule.
    first_round : int
        First round of `picks`.
    seed : int
        The run's seed.
    sticky_edge : bool
        Whether a client keeps its first edge for the window. Edges do not wait for each other between the rounds of a
        window, so only rounds at the same edge have a fixed order.

    Returns
    -------
    list of Round
        One assignment per round.
    """
    loads = {e: np.zeros_like(m.labels, dtype=np.float64) for m in members for e in m.edges}
    plan: list[Round] = []
    first_edges: Round = {}
    for round_, chosen in enumerate(picks, first_round):
        picked = sorted(chosen, key=lambda m: m.name)
        assignment = choice.assign(picked, members, loads, seed, round_)
        if sticky_edge:
            assignment = {name: first_edges.setdefault(name, edge) for name, edge in assignment.items()}
        for member in picked:
            loads[assignment[member.name]] = loads[assignment[member.name]] + member.labels
        plan.append(assignment)
    return plan


def mean_homogeneity(plan: Sequence[Round], members: Sequence[Member], form: Form = "root") -> float:
    """Return the mean SH score over the edges to which a plan assigns clients."""
    by_name = {m.name: m for m in members}
    loads: dict[str, np.ndarray] = {}
    for assignment in plan:
        for client, edge in assignment.items():
            labels = by_name[client].labels.astype(np.float64)
            loads[edge] = loads[edge] + labels if edge in loads else labels
    return float(np.mean([sh_score(q, form) for q in loads.values()])) if loads else 2.0
