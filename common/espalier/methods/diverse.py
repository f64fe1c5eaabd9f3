"""DivFL's choice: the clients whose gradients stand for everyone's (Balakrishnan et al., ICLR 2022)."""

from __future__ import annotations

import heapq

import numpy as np

#: Coordinates a sketch hashes at a time.
_CHUNK = 1 << 18


def sketch(vector: np.ndarray, dim: int, seed: int) -> np.ndarray:
    """Shorten a gradient so that a table of everyone's fits in memory: a count sketch.

    Every coordinate is added, with a random sign, to a random one of `dim` sums (Charikar, Chen and
    Farach-Colton 2002; as a projection: Weinberger et al. 2009, arXiv 0902.2206). The map is linear, so
    differences are kept: ``E‖Sx‖² = ‖x‖²`` with a standard deviation of at most ``√(2/dim)·‖x‖²``.

    Parameters
    ----------
    vector : np.ndarray
        Any shape, read in C order.
    dim : int
        Length of the sketch.
    seed : int
        Same for all vectors that are to be compared, e.g. of :func:`espalier.seeds.seed_for`.

    Returns
    -------
    np.ndarray
        float32, shape (dim,); a vector that is no longer than `dim` comes back whole, in its length.
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
        One client's gradient, or its sketch, a row; shape (n, dim).

    Returns
    -------
    np.ndarray
        float64, shape (n, n), symmetric, zero on the diagonal.
    """
    table = np.zeros((len(gradients), len(gradients)))
    refresh(table, gradients, range(len(gradients)))
    return table


def refresh(table: np.ndarray, gradients: np.ndarray, rows: range | list[int]) -> None:
    """Renew in place the distances of some clients to everyone.

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
        # Not by inner products: those cancel where gradients are alike, which is what matters here.
        table[i] = table[:, i] = np.sqrt(np.square(wide - wide[i]).sum(axis=1))


def cost(table: np.ndarray, chosen: list[int]) -> float:
    """Return G(S) = Σ_k min_{i∈S} D_ki, what the choice minimises."""
    return float(table[:, chosen].min(axis=1).sum())


def greedy(table: np.ndarray, count: int) -> list[int]:
    """Choose clients one by one, each the one that lowers G(S) most; of equal ones the first.

    The utility ``n·max D − G(S)`` is monotone and submodular, so it is at least (1 − 1/e) of the optimum
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
        m positions in the order they were chosen.

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

    A gain never grows as more is chosen, not even by rounding: its terms fall one by one and are summed
    in the same order. So a candidate whose old gain is below another's new one need not be looked at.
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
    """Choose as :func:`greedy` does, each time among `pool` candidates drawn at random from those left.

    Mirzasoleiman et al. 2015 (arXiv 1409.7938): (1 − 1/e − ε) in expectation with a pool of (n/m)·ln(1/ε).

    Parameters
    ----------
    table, count
        See :func:`greedy`.
    pool : int
        Candidates a step, at least 1; DivFL's authors take max(m, n/10).
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
    """Return each candidate's distances as a row, and everyone's distance to the empty choice, max D."""
    if not 1 <= count <= len(table):
        raise ValueError(f"{count} clients to choose of {len(table)}")
    return np.ascontiguousarray(table.T, np.float64), np.full(len(table), float(table.max()))


def _gain(columns: np.ndarray, nearest: np.ndarray, i: int) -> float:
    """Return by how much G falls if `i` joins the choice."""
    return float(np.maximum(nearest - columns[i], 0.0).sum())


def _take(best: int, left: list[int], chosen: list[int], columns: np.ndarray, nearest: np.ndarray) -> None:
    left.remove(best)
    chosen.append(best)
    np.minimum(nearest, columns[best], out=nearest)
