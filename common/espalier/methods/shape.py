"""ShapeFL: edge association by communication cost and data diversity (IEEE/ACM ToN 2024).

Y. Deng, F. Lyu, T. Xia, Y. Zhou, Y. Zhang, J. Ren, Y. Yang: "A Communication-Efficient Hierarchical
Federated Learning Framework via Shaping Data Distribution at Edge", IEEE/ACM Transactions on Networking
32(3), 2024, doi 10.1109/TNET.2024.3363916. The equations and the two algorithms are taken from a public
re-implementation (taut0logy/shapefl_implementation), as the paper's text was not available.

From the paper: the objective, with E the open edges, M_e the clients of e and D_e their samples,

    J = κ Σ_n c_ne(n) + Σ_{e∈E} c_ec − γ / |E| · Σ_{e∈E} Σ_{i<j∈M_e} S_ij D_i D_j / C(D_e, 2)    (eq. 14, 19)

where κ is the number of edge rounds per cloud round; the greedy association GoA (Algorithm 1); the local
search LoS over the sets of open edges by open, close and swap (Algorithm 2); a bound B on an edge's clients.

Differences: S_ij is the cosine distance of label counts, which the cloud has; the paper compares updates of the
last layer. Both cost terms are divided by κ·N·(mean link), so γ has no unit. A link without a measurement, and an
edge's link to the cloud, cost the mean of the measured links. B is 1.5 times an even share, and is exceeded if a
client reaches no other edge. The search starts from all edges instead of a random set and takes the best step
instead of the first. Moves and exchanges of clients improve the assignments of GoA, of the nearest edges and, at
the end, a few random ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from pydantic import Field

from espalier.config.fields import Count, NonNegative, SettingsGroup
from espalier.methods.planning import Member, Round
from espalier.seeds import rng_for

#: Gains below this are rounding errors.
_EPSILON = 1e-12
#: Largest number of clients for which exchanges are tried: evaluating them takes O(N²).
_MAX_EXCHANGE = 500
#: Random assignments that are improved at the end in addition to GoA's.
_RESTARTS = 8

#: The minimised value: clients above the edges' bounds, then J.
Score = tuple[int, float]


class ShapeSettings(SettingsGroup):
    """The objective of the association."""

    shape_diversity: NonNegative = Field(
        default=1.0, description="weight of the diversity of edge data against communication cost"
    )
    shape_edges: Count = Field(
        default=0, description="number of edges that aggregate; 0: the number of least cost"
    )


class ByShape:
    """ShapeFL's association of all clients; the participants of a round use their edges in it.

    It depends on the clients in the tree, not on the participants, so a client keeps its edge until a client joins or
    leaves.

    Parameters
    ----------
    diversity : float
        γ, the weight of diversity: at 1, one unit of mean diversity (in [0, 1]) equals the cost of all clients' traffic
        over mean links.
    edges : int
        Number of edges that aggregate; 0: the number with the lowest cost.
    rounds : int
        κ, edge rounds per cloud round.
    """

    def __init__(self, diversity: float, edges: int = 0, rounds: int = 1) -> None:
        self.diversity, self.edges, self.rounds = diversity, edges, rounds
        self._known: tuple[object, Round] | None = None

    def assign(
        self,
        picked: Sequence[Member],
        members: Sequence[Member],
        loads: Mapping[str, np.ndarray],
        seed: int,
        round_: int,
    ) -> Round:
        """Return the participants' edges, independent of loads and seed; see `EdgeChoice`."""
        if not picked:
            return {}
        key = tuple(
            (m.name, m.samples, m.edges, m.labels.tobytes(), tuple(sorted(m.links.items())))
            for m in sorted(members, key=lambda m: m.name)
        )
        if self._known is None or self._known[0] != key:
            self._known = key, self.associate(members)
        return {m.name: self._known[1][m.name] for m in picked}

    def associate(self, members: Sequence[Member]) -> Round:
        """Return every client's edge.

        Parameters
        ----------
        members : sequence of Member
            All clients; each reaches at least one edge.
        """
        problem = Problem(members, self.diversity, self.rounds, self.edges)
        return problem.named(problem.solve(self.edges))


class Problem:
    """One instance: clients in the order of their names (rows), edges in theirs (columns).

    Attributes
    ----------
    cost : np.ndarray
        Share of the traffic that each client causes at each edge, κ c_ne / (κ N c̄), shape (clients,
        edges); infinite if it does not reach the edge.
    uplink : float
        An open edge's own, c_ec / (κ N c̄).
    distance : np.ndarray
        S_ij, shape (clients, clients): 1 − cosine of the label counts; in [0, 1] without noise.
    samples : np.ndarray
        D_i, shape (clients,).
    bound : int
        B, the largest number of clients of an edge.
    """

    def __init__(self, members: Sequence[Member], diversity: float, rounds: int, edges: int = 0) -> None:
        ordered = sorted(members, key=lambda m: m.name)
        self.names = [m.name for m in ordered]
        self.edges = sorted({e for m in ordered for e in m.edges})
        known = [m.links[e] for m in ordered for e in m.edges if e in m.links]
        mean = float(np.mean(known)) if known and sum(known) > 0 else 1.0
        count = max(len(ordered), 1)
        self.cost = np.full((len(ordered), len(self.edges)), math.inf)
        for i, member in enumerate(ordered):
            for edge in member.edges:
                self.cost[i, self.edges.index(edge)] = member.links.get(edge, mean) / (count * mean)
        self.uplink = 1.0 / (rounds * count)
        self.samples = np.array([m.samples for m in ordered], dtype=np.float64)
        self.distance = _cosine_distances([m.labels for m in ordered])
        self._pairs = self.distance * np.outer(self.samples, self.samples)
        self.diversity = diversity
        self.bound = math.ceil(1.5 * count / (edges or max(len(self.edges), 1)))

    def named(self, assignment: np.ndarray) -> Round:
        """Return an assignment (a column per client) by names."""
        return {n: self.edges[int(e)] for n, e in zip(self.names, assignment, strict=True)}

    def score(self, assignment: np.ndarray, opened: frozenset[int]) -> Score:
        """Return the cost of an assignment: clients above the bounds, then J."""
        above = sum(max(0, int(np.sum(assignment == e)) - self.bound) for e in opened)
        links = float(self.cost[np.arange(len(assignment)), assignment].sum())
        mixed = sum(self._mixture(np.flatnonzero(assignment == e)) for e in sorted(opened))
        return above, links + self.uplink * len(opened) - self.diversity * mixed / len(opened)

    def solve(self, edges: int = 0) -> np.ndarray:
        """Return an assignment, shape (clients,): LoS over the sets of open edges.

        Parameters
        ----------
        edges : int
            Number of open edges, if that many reach all clients; 0: free.
        """
        opened = frozenset(range(len(self.edges)))
        while 0 < edges < len(opened) and (fewer := self._covering(opened - {e} for e in opened)):
            opened = self._best(fewer)[2]
        best = self._evaluate(opened)
        while steps := self._steps(opened, fixed=edges > 0):
            nearest = self._best(steps)
            if not _less(nearest[0], best[0]):
                break
            best, opened = nearest[:2], nearest[2]
        return self._improved([best[1], *self._random(opened)], opened)[1]

    def associate(self, opened: frozenset[int]) -> np.ndarray:
        """Return GoA's assignment to open edges: repeatedly the client and edge that add least to J.

        Clients that reach no edge below its bound are assigned last and exceed a bound.
        """
        columns = np.array(sorted(opened))
        weight = self.diversity / len(columns)
        assignment = np.full(len(self.names), -1)
        pairs, totals = np.zeros(len(columns)), np.zeros(len(columns))
        sizes = np.zeros(len(columns), dtype=int)
        pair_sums = np.zeros((len(self.names), len(columns)))  # Σ_{j∈M_e} S_nj D_n D_j
        # Increase of J by client and edge; for an edge without clients only the cost of the link.
        added = self.cost[:, columns]
        for _ in self.names:
            below_bound = np.where(sizes < self.bound, added, math.inf)
            choice = below_bound if np.isfinite(below_bound).any() else added
            n, e = divmod(int(np.argmin(choice)), len(columns))
            assignment[n] = columns[e]
            pairs[e] += pair_sums[n, e]
            totals[e] += self.samples[n]
            sizes[e] += 1
            pair_sums[:, e] += self._pairs[:, n]
            mixed = _ratio(pairs[e] + pair_sums[:, e], totals[e] + self.samples) - _ratio(pairs[e], totals[e])
            added[:, e] = self.cost[:, columns[e]] - weight * mixed
            added[assignment >= 0] = math.inf
        return assignment

    def _evaluate(self, opened: frozenset[int]) -> tuple[Score, np.ndarray]:
        """Return the better of GoA's assignment and the nearest edges', both improved, and its score."""
        columns = np.array(sorted(opened))
        nearest = columns[self.cost[:, columns].argmin(axis=1)]
        return self._improved([self.associate(opened), nearest], opened)

    def _improved(self, starts: Iterable[np.ndarray], opened: frozenset[int]) -> tuple[Score, np.ndarray]:
        """Return the best improved assignment; ties go to the first start."""
        found = [self._improve(start, opened) for start in starts]
        scores = [self.score(assignment, opened) for assignment in found]
        best = min(range(len(found)), key=lambda i: (scores[i], i))
        return scores[best], found[best]

    def _best(self, candidates: Sequence[frozenset[int]]) -> tuple[Score, np.ndarray, frozenset[int]]:
        """Return the set of open edges with the lowest cost, ties by the edges' order."""
        found = [(*self._evaluate(opened), opened) for opened in candidates]
        return min(found, key=lambda f: (f[0], sorted(f[2])))

    def _random(self, opened: frozenset[int]) -> Iterator[np.ndarray]:
        """Yield a few random assignments from a fixed seed."""
        columns = np.array(sorted(opened))
        cost, rng = self.cost[:, columns], rng_for(0, "cloud", 0, "shape")
        for _ in range(_RESTARTS):
            yield columns[np.where(np.isfinite(cost), rng.random(cost.shape), math.inf).argmin(axis=1)]

    def _covering(self, candidates: Iterable[frozenset[int]]) -> list[frozenset[int]]:
        """Return the sets of open edges that reach all clients."""
        reach = np.isfinite(self.cost)
        return [c for c in candidates if c and bool(reach[:, sorted(c)].any(axis=1).all())]

    def _steps(self, opened: frozenset[int], *, fixed: bool) -> list[frozenset[int]]:
        """Return the sets one step away: swap, and open and close unless the number is fixed."""
        closed = frozenset(range(len(self.edges))) - opened
        steps = [opened - {e} | {f} for e in opened for f in closed]
        if not fixed:
            steps += [opened - {e} for e in opened] + [opened | {e} for e in closed]
        return self._covering(steps)

    def _improve(self, assignment: np.ndarray, opened: frozenset[int]) -> np.ndarray:
        """Move single clients, or exchange two if no move improves J, best step first, until no step does."""
        assignment, everyone = assignment.copy(), np.arange(len(self.names))
        weight, finite = self.diversity / len(opened), self.cost[np.isfinite(self.cost)]
        # Larger than any change of J, so the number of clients above a bound decides first.
        penalty = 2 * (1 + float(finite.sum()) + 2 * self.diversity)
        while True:
            member = assignment[:, None] == np.arange(len(self.edges))
            pair_sums = self._pairs @ member
            totals, sizes = self.samples @ member, member.sum(axis=0)
            pairs = (pair_sums * member).sum(axis=0) / 2
            own, size = assignment, self.samples
            ratio = _ratio(pairs, totals)
            here, spent = pair_sums[everyone, own], self.cost[everyone, own]
            left = _ratio(pairs[own] - here, totals[own] - size) - ratio[own]
            joined = _ratio(pairs + pair_sums, totals + size[:, None]) - ratio
            above = (sizes >= self.bound) * 1.0 - (sizes > self.bound)[own][:, None]
            moves = self.cost - spent[:, None] - weight * (left[:, None] + joined) + penalty * above
            usable = np.isin(np.arange(len(self.edges)), sorted(opened)) & ~member
            moves = np.where(usable, moves, math.inf)
            n, e = divmod(int(np.argmin(moves)), len(self.edges))
            gain, step = float(moves[n, e]), [(n, e)]
            if gain >= -_EPSILON and len(self.names) <= _MAX_EXCHANGE:
                there = pair_sums[:, own]  # [n, k]: pairs of n with the clients of k's edge
                change = size - size[:, None]  # [n, k]: D_k − D_n
                # n is replaced by k at n's edge; the other half of an exchange is the transposed matrix.
                half = _ratio(
                    pairs[own][:, None] - here[:, None] + there.T - self._pairs, totals[own][:, None] + change
                )
                half = self.cost[:, own].T - spent[:, None] - weight * (half - ratio[own][:, None])
                swaps = np.where(own[:, None] == own, math.inf, half + half.T)
                n, k = divmod(int(np.argmin(swaps)), len(self.names))
                if float(swaps[n, k]) < gain:
                    gain, step = float(swaps[n, k]), [(n, int(own[k])), (k, int(own[n]))]
            if not gain < -_EPSILON:
                return assignment
            for client, edge in step:
                assignment[client] = edge

    def _mixture(self, clients: np.ndarray) -> float:
        pairs = self._pairs[np.ix_(clients, clients)].sum() / 2
        return float(_ratio(float(pairs), float(self.samples[clients].sum())))


def _ratio(pairs: np.ndarray | float, totals: np.ndarray | float) -> np.ndarray:
    """Return Σ S_ij D_i D_j / C(D, 2), 0 with fewer than two samples."""
    totals = np.asarray(totals)
    count = totals * (totals - 1) / 2
    result: np.ndarray = np.where(count > 0, pairs, 0.0) / np.where(count > 0, count, 1.0)
    return result


def _cosine_distances(labels: Sequence[np.ndarray]) -> np.ndarray:
    """Return 1 − cosine of each pair; a client without labels has distance 0 to all others."""
    if not labels:
        return np.zeros((0, 0))
    rows: np.ndarray = np.stack([np.asarray(v, dtype=np.float64) for v in labels])
    norms = np.linalg.norm(rows, axis=1)
    unit = rows / np.where(norms > 0, norms, 1.0)[:, None]
    distances: np.ndarray = np.where(np.outer(norms, norms) > 0, 1.0 - unit @ unit.T, 0.0)
    np.fill_diagonal(distances, 0.0)
    return distances.clip(min=0.0)


def _less(a: Score, b: Score) -> bool:
    """Return whether a is below b by more than rounding errors."""
    return a[0] < b[0] or (a[0] == b[0] and a[1] < b[1] - _EPSILON)
