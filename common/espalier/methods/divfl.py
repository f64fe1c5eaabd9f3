"""DivFL: diverse client selection by facility location (Balakrishnan et al., ICLR 2022)."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from espalier.config.fields import SettingsGroup
from espalier.methods.fedavg import FedAvg
from espalier.methods.planning import Member, pick_clients, pick_count
from espalier.methods.selection import Answer, Selection, register_selection
from espalier.seeds import rng_for, seed_for
from espalier.tasks.local_metrics import local_gradient
from espalier.training.objectives import LocalRound, Objective
from espalier.wire.sections import GRADIENT, SectionId

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from espalier.config.run_settings import RunSettings

#: Longest gradient that the table stores in full; a longer one is sketched to this length: a table of 1000 clients
#: takes at most 64 MB, and squared distances have a relative standard deviation of at most 1.1 %.
LONGEST = 1 << 14
#: Coordinates a sketch hashes at a time.
_CHUNK = 1 << 18


class DivFL(FedAvg):
    """Algorithm 1: FedAvg over the clients whose gradients approximate those of all clients."""

    name = "divfl"
    own_selection = "divfl"


# --- client: the gradient at the received model --------------------------------------------------------


class ReceivedGradient(Objective):
    """Sends the full-batch gradient at the received model, ∇F_k(w), in the section "gradient" (section 3)."""

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Compute the gradient."""
        self._gradient = local_gradient(model, local, "received gradient")

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return 0: the term only measures."""
        return images.new_zeros(())

    def extra(self) -> dict[SectionId, dict[str, np.ndarray]]:
        """Return the gradient."""
        return {GRADIENT: self._gradient}


# --- cloud: the selection ------------------------------------------------------------------------------


@register_selection("divfl")
class FacilityLocation(Selection):
    """m clients that minimise G(S) = Σ_k min_{i∈S} ‖∇F_k − ∇F_i‖ (Balakrishnan et al., ICLR 2022, eq. 4).

    With `divfl-gradients = "ideal"` every client sends a fresh gradient whenever a window is planned. With
    "no-overhead" a client is asked once, when it joins; afterwards participants report their gradients (`observe`),
    and only their rows of the table are updated. The server's mean is weighted by samples, as in the authors' code. All
    rounds of a window use the set chosen at its start.

    Gradients of another size than the newest (the model was pruned) are dropped, and their clients are asked again for
    the next window.
    """

    class Settings(SettingsGroup):
        """Which gradients are updated, and how the set is found."""

        divfl_gradients: Literal["ideal", "no-overhead"] = Field(
            default="no-overhead",
            description="whose gradients are updated in a round: all clients' (ideal), the participants' (no-overhead)",
        )
        divfl_greedy: Literal["greedy", "lazy", "stochastic"] = Field(
            default="lazy", description="algorithm that maximises the facility location function"
        )

    probe = "gradient"
    uses = (Settings,)

    def __init__(self, settings: RunSettings) -> None:
        super().__init__(settings)
        # In the ideal variant every client is asked before each window, so participants need not report.
        self.reports = (
            "gradient" if settings.of(FacilityLocation.Settings).divfl_gradients == "no-overhead" else ""
        )
        self._rows: dict[str, np.ndarray] = {}
        self._size = 0
        self._members: list[Member] = []
        self._chosen: list[str] = []

    def measurement(self) -> Objective | None:
        """Return the term that reports each participant's gradient, with `divfl-gradients = "no-overhead"`."""
        return ReceivedGradient() if self.reports else None

    def candidates(self, round_: int, members: Sequence[Member]) -> list[Member]:
        """Return all members ("ideal"), or those whose gradient is not known, often none."""
        self._members = sorted(members, key=lambda m: m.name)
        ideal = self.settings.of(FacilityLocation.Settings).divfl_gradients == "ideal"
        return [m for m in self._members if ideal or m.name not in self._rows]

    def choose(
        self, round_: int, candidates: Sequence[Member], answers: Mapping[str, Answer]
    ) -> list[Member]:
        """Return the chosen clients among those whose gradient is known; fewer than m if fewer are."""
        asked = {m.name for m in candidates}
        for name in asked:
            # A client that was asked and did not answer has no row: the old one is out of date.
            self._rows.pop(name, None)
        for name in sorted(asked & answers.keys()):
            self._store(name, answers[name].arrays)
        known = [m for m in self._members if m.name in self._rows]
        count = min(pick_count(self.settings.fraction, len(self._members)), len(known))
        picked = self._maximise(known, count, round_) if count else []
        self._chosen = [m.name for m in picked]
        return picked

    def later(self, round_: int, members: Sequence[Member]) -> tuple[list[Member], int]:
        """Return the set chosen at the window's start; if none of it is left, m clients at random."""
        present = [m for m in sorted(members, key=lambda m: m.name) if m.name in self._chosen]
        s = self.settings
        return present or pick_clients(members, s.fraction, s.seed, round_), 0

    def observe(
        self,
        round_: int,
        metrics: Mapping[str, Mapping[str, float]],
        gradients: Mapping[str, Mapping[str, np.ndarray]],
    ) -> None:
        """Update the participants' rows."""
        for name in sorted(gradients):
            self._store(name, gradients[name])

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """Return in "gradient" the table's row of each client, in "size" the gradients' full length."""
        rows = dict(sorted(self._rows.items()))
        return {"size": {"size": np.array([self._size])}, "gradient": rows} if rows else {}

    def restore(self, state: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Restore the table."""
        self._size = int(state["size"]["size"][0]) if "size" in state else 0
        rows = state.get("gradient", {})
        self._rows = {name: np.asarray(row, dtype=np.float32) for name, row in rows.items()}

    def _store(self, name: str, gradient: Mapping[str, np.ndarray]) -> None:
        """Store a gradient, flattened in the order of its tensors' names, if it is finite."""
        if not gradient:
            return
        row = np.concatenate([np.ravel(gradient[n]).astype(np.float32) for n in sorted(gradient)])
        if not np.isfinite(row).all():
            return
        if row.size != self._size:
            self._rows, self._size = {}, row.size
        # One seed for all rows and rounds: only rows of the same sketch can be compared.
        self._rows[name] = sketch(row, LONGEST, seed_for(self.settings.seed, "cloud", 0, "sketch"))

    def _maximise(self, known: Sequence[Member], count: int, round_: int) -> list[Member]:
        table = distances(np.stack([self._rows[m.name] for m in known]))
        how = self.settings.of(FacilityLocation.Settings).divfl_greedy
        if how == "stochastic":
            pool = max(count, round(0.1 * len(known)))
            rng = rng_for(self.settings.seed, "cloud", round_, "selection")
            chosen = stochastic_greedy(table, count, pool, rng)
        else:
            chosen = (lazy_greedy if how == "lazy" else greedy)(table, count)
        return [known[i] for i in sorted(chosen)]


# --- submodular maximisation ---------------------------------------------------------------------------


def sketch(vector: np.ndarray, dim: int, seed: int) -> np.ndarray:
    """Compress a gradient by a count sketch, so that a table of all clients' gradients fits in memory.

    Each coordinate is added with a random sign to a random one of `dim` sums (Charikar, Chen and
    Farach-Colton 2002; as a projection: Weinberger et al. 2009, arXiv 0902.2206). The map is linear and
    preserves norms of differences in expectation: ``E‖Sx‖² = ‖x‖²`` with a standard deviation of at most
    ``√(2/dim)·‖x‖²``.

    Parameters
    ----------
    vector : np.ndarray
        Any shape, read in C order.
    dim : int
        Length of the sketch.
    seed : int
        Must be the same for all vectors to be compared, e.g. of :func:`espalier.seeds.seed_for`.

    Returns
    -------
    np.ndarray
        float32, shape (dim,); a vector of at most `dim` values is returned unchanged.
    """
    flat = vector.reshape(-1)
    if len(flat) <= dim:
        return flat.astype(np.float32)
    rng = np.random.default_rng(seed)
    sums = np.zeros(dim)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK].astype(np.float64)
        draws = rng.integers(0, 2 * dim, size=len(part))
        sums += np.bincount(draws >> 1, np.where(draws & 1, -part, part), minlength=dim)
    return sums.astype(np.float32)


def distances(gradients: np.ndarray) -> np.ndarray:
    """Return D_ij = ‖∇F_i − ∇F_j‖.

    Parameters
    ----------
    gradients : np.ndarray
        A row per client: its gradient or sketch; shape (n, dim).

    Returns
    -------
    np.ndarray
        float64, shape (n, n), symmetric, zero on the diagonal.
    """
    table = np.zeros((len(gradients), len(gradients)))
    refresh(table, gradients, range(len(gradients)))
    return table


def refresh(table: np.ndarray, gradients: np.ndarray, rows: range | list[int]) -> None:
    """Update in place the distances of some clients to all others.

    Parameters
    ----------
    table : np.ndarray
        Distances, shape (n, n).
    gradients : np.ndarray
        All clients' gradients or sketches, shape (n, dim).
    rows : sequence of int
        Clients whose gradient changed.
    """
    wide = gradients.astype(np.float64)
    for i in rows:
        # Not by inner products, which lose precision for similar gradients, the ones that decide the choice.
        table[i] = table[:, i] = np.sqrt(np.square(wide - wide[i]).sum(axis=1))


def cost(table: np.ndarray, chosen: list[int]) -> float:
    """Return G(S) = Σ_k min_{i∈S} D_ki, the objective to minimise."""
    return float(table[:, chosen].min(axis=1).sum())


def greedy(table: np.ndarray, count: int) -> list[int]:
    """Choose clients one by one, each the one that lowers G(S) most; ties go to the first.

    The utility ``n·max D − G(S)`` is monotone and submodular, so the result is at least (1 − 1/e) of the optimum
    (Nemhauser, Wolsey and Fisher 1978).

    Parameters
    ----------
    table : np.ndarray
        Distances D, not negative, shape (n, n).
    count : int
        Clients to choose, m.

    Returns
    -------
    list[int]
        Positions of the m clients in the order of choice.

    Raises
    ------
    ValueError
        If m is not in 1 to n.
    """
    columns, nearest = _begin(table, count)
    left = list(range(len(table)))
    chosen: list[int] = []
    for _ in range(count):
        _take(max(left, key=lambda i: (_gain(columns, nearest, i), -i)), left, chosen, columns, nearest)
    return chosen


def lazy_greedy(table: np.ndarray, count: int) -> list[int]:
    """Choose as :func:`greedy` does, with fewer evaluations (Minoux 1978).

    A gain never grows as the set does, not even by rounding: each of its terms falls and they are summed in the same
    order. So a candidate whose old gain is below another's new gain need not be evaluated again.
    """
    columns, nearest = _begin(table, count)
    heap = [(-_gain(columns, nearest, i), i, 0) for i in range(len(table))]
    heapq.heapify(heap)
    chosen: list[int] = []
    while len(chosen) < count:
        _, i, step = heapq.heappop(heap)
        if step < len(chosen):
            heapq.heappush(heap, (-_gain(columns, nearest, i), i, len(chosen)))
            continue
        chosen.append(i)
        np.minimum(nearest, columns[i], out=nearest)
    return chosen


def stochastic_greedy(table: np.ndarray, count: int, pool: int, rng: np.random.Generator) -> list[int]:
    """Choose as :func:`greedy` does, each time among `pool` random candidates of the remaining ones.

    Mirzasoleiman et al. 2015 (arXiv 1409.7938): (1 − 1/e − ε) in expectation with a pool of (n/m)·ln(1/ε).

    Parameters
    ----------
    table, count
        See :func:`greedy`.
    pool : int
        Candidates per step, at least 1; DivFL's authors take max(m, n/10).
    rng : np.random.Generator
        Draws the candidates.

    Raises
    ------
    ValueError
        If m is not in 1 to n, or the pool is empty.
    """
    if pool < 1:
        raise ValueError(f"a pool of {pool} candidates")
    columns, nearest = _begin(table, count)
    left = list(range(len(table)))
    chosen: list[int] = []
    for _ in range(count):
        drawn = [int(i) for i in rng.choice(left, min(pool, len(left)), replace=False)]
        _take(max(drawn, key=lambda i: (_gain(columns, nearest, i), -i)), left, chosen, columns, nearest)
    return chosen


def _begin(table: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each candidate's distances as a row, and every client's distance to the empty set, max D."""
    if not 1 <= count <= len(table):
        raise ValueError(f"{count} clients to choose of {len(table)}")
    return np.ascontiguousarray(table.T, np.float64), np.full(len(table), float(table.max()))


def _gain(columns: np.ndarray, nearest: np.ndarray, i: int) -> float:
    """Return the decrease of G if `i` is added."""
    return float(np.maximum(nearest - columns[i], 0.0).sum())


def _take(best: int, left: list[int], chosen: list[int], columns: np.ndarray, nearest: np.ndarray) -> None:
    left.remove(best)
    chosen.append(best)
    np.minimum(nearest, columns[best], out=nearest)
