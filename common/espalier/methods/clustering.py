"""Clustering of clients for CFL and IFCA: similarities of updates, bipartition, choice of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from espalier import lazy

if TYPE_CHECKING:
    from sklearn import cluster

else:
    cluster = lazy.load("sklearn.cluster")

Linkage = Literal["single", "complete"]

#: Values of each client's update that are converted to double precision at a time.
_CHUNK = 1 << 16


# --- CFL (Sattler, Müller and Samek 2020, arXiv 1910.01991) ----------------------------------------


def gram_matrix(updates: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """Return the inner products ⟨Δ_i, Δ_j⟩ over all tensors, shape (n, n), float64.

    Norms, cosines and the norm of any mean of the updates follow from it; see :func:`cosines` and
    :func:`update_norms`.

    Parameters
    ----------
    updates : sequence of mappings
        Each client's difference local − received, with the same names and shapes.

    Raises
    ------
    ValueError
        If names or shapes differ between clients.
    """
    gram = np.zeros((len(updates), len(updates)))
    if not updates:
        return gram
    first = updates[0]
    for update in updates[1:]:
        if {n: a.shape for n, a in update.items()} != {n: a.shape for n, a in first.items()}:
            raise ValueError("the clients' updates do not have the same tensors")
    for name in first:
        flat = [update[name].reshape(-1) for update in updates]
        for start in range(0, first[name].size, _CHUNK):
            part = np.stack([f[start : start + _CHUNK] for f in flat]).astype(np.float64)
            gram += part @ part.T
    return gram


def cosines(gram: np.ndarray) -> np.ndarray:
    """Return α_ij = ⟨Δ_i, Δ_j⟩ / (‖Δ_i‖ ‖Δ_j‖) from inner products, shape (n, n), within [−1, 1].

    A zero update has no direction: its cosine with all others is 0. The diagonal is 1.
    """
    norms = np.sqrt(np.diag(gram))
    scale = np.outer(norms, norms)
    alpha: np.ndarray = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)
    # A matrix product may round the two triangles differently; linkage needs a symmetric matrix.
    alpha = (alpha + alpha.T) / 2
    np.clip(alpha, -1.0, 1.0, out=alpha)
    np.fill_diagonal(alpha, 1.0)
    return alpha


def cosine_matrix(updates: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """Return the cosines between the clients' updates over all tensors, shape (n, n).

    Raises
    ------
    ValueError
        If names or shapes differ between clients.
    """
    return cosines(gram_matrix(updates))


def update_norms(gram: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
    """Return ‖Σ p_i Δ_i‖ and max_i ‖Δ_i‖, the arguments of :func:`should_split`.

    Parameters
    ----------
    gram : np.ndarray
        Inner products of the cluster's updates, shape (n, n), n at least 1.
    weights : np.ndarray, optional
        Weights of the mean, shape (n,), normalised here; equal by default.
    """
    shares = np.ones(len(gram)) if weights is None else np.asarray(weights, np.float64)
    shares = shares / shares.sum()
    # Rounding may make the square of a mean that cancels slightly negative.
    mean = max(float(shares @ gram @ shares), 0.0)
    return mean**0.5, float(np.diag(gram).max()) ** 0.5


class SplitLimits(Protocol):
    """The thresholds of :func:`should_split`."""

    @property
    def cfl_mean_norm(self) -> float: ...  # noqa: D102
    @property
    def cfl_max_norm(self) -> float: ...  # noqa: D102
    @property
    def cfl_from_round(self) -> int: ...  # noqa: D102


def should_split(norm_of_mean: float, max_norm: float, size: int, round_: int, limits: SplitLimits) -> bool:
    """Return whether a cluster is stationary as a whole while some of its clients are not.

    Parameters
    ----------
    norm_of_mean : float
        ‖mean of the members' updates‖; must be below `cfl-mean-norm` (ε1).
    max_norm : float
        Largest norm of an update; must be above `cfl-max-norm` (ε2).
    size : int
        Number of members; clusters of 2 or fewer are not split.
    round_ : int
        Round of the updates; must be at least `cfl-from-round`.
    limits : SplitLimits
        The thresholds, e.g. ``CFL.Settings``.
    """
    return (
        size > 2
        and round_ >= limits.cfl_from_round
        and norm_of_mean < limits.cfl_mean_norm
        and max_norm > limits.cfl_max_norm
    )


def bipartition(similarity: np.ndarray, linkage: Linkage = "single") -> tuple[list[int], list[int]]:
    """Split clients into two groups with low similarity between them.

    Single linkage minimises the largest similarity between the groups, the paper's criterion: it merges the most
    similar groups until two are left, so any other split separates a pair that is at least as similar. Complete
    linkage, which the authors' code uses, gives compact groups and does not always reach that optimum.

    Parameters
    ----------
    similarity : np.ndarray
        Symmetric, within [−1, 1], shape (n, n), n at least 2.
    linkage : {"single", "complete"}
        Setting `cfl-linkage`.

    Returns
    -------
    tuple[list[int], list[int]]
        Ascending positions of the two groups, neither empty; the first contains position 0.

    Raises
    ------
    ValueError
        If there are fewer than 2 clients, or a similarity is not finite.
    """
    if len(similarity) < 2:
        raise ValueError(f"{len(similarity)} client(s) cannot be split in two")
    if not np.isfinite(similarity).all():
        raise ValueError("a similarity between clients is not finite")
    distance = 1.0 - similarity
    np.fill_diagonal(distance, 0.0)
    model = cluster.AgglomerativeClustering(n_clusters=2, metric="precomputed", linkage=linkage)
    labels = model.fit_predict(distance)
    first = np.flatnonzero(labels == labels[0]).tolist()
    second = np.flatnonzero(labels != labels[0]).tolist()
    return first, second


# --- IFCA (Ghosh et al. 2020, arXiv 2006.04088) ----------------------------------------------------


def nearest_model(losses: Sequence[float]) -> int:
    """Return ĵ = argmin_j F_i(θ_j): the model a client belongs to; ties go to the first.

    Raises
    ------
    ValueError
        If no loss is finite. Models with a loss that is not finite are ignored.
    """
    values = np.asarray(losses, np.float64)
    if not np.isfinite(values).any():
        raise ValueError("no model has a finite loss")
    return int(np.argmin(np.where(np.isfinite(values), values, np.inf)))


def well_spread(assignments: Sequence[int], clusters: int, least_share: float | None = None) -> bool:
    """Return whether every initial model was chosen by enough clients.

    If initial models are too similar, or one is best for all clients, the others never get members. So the authors draw
    initial models until each is chosen by a minimum share of the clients.

    Parameters
    ----------
    assignments : sequence of int
        Model chosen by each client, in ``range(clusters)``.
    clusters : int
        Number of models.
    least_share : float, optional
        Minimum share of the clients per model. The authors' code requires 35 % with two models and 10 % with four; the
        default follows it, with ``0.4 / clusters`` for other numbers.

    Raises
    ------
    ValueError
        If an assignment is not a model's index.
    """
    members = np.bincount(np.asarray(assignments, np.int64), minlength=clusters)
    if len(members) > clusters:
        raise ValueError(f"a client is assigned to model {len(members) - 1}, there are {clusters}")
    if least_share is None:
        least_share = 0.35 if clusters == 2 else 0.4 / clusters
    # With some slack for rounding: 0.4 / 7 · 105 comes out above 6.
    return bool((members >= least_share * len(assignments) - 1e-9).all()) and len(assignments) > 0
