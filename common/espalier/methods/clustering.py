"""Which clients belong together: the mathematics of CFL and IFCA, apart from rounds and messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from espalier import lazy

if TYPE_CHECKING:
    from sklearn import cluster

    from espalier.config.settings import Settings
else:
    cluster = lazy.load("sklearn.cluster")

Linkage = Literal["single", "complete"]

#: Numbers of every client's update that are in double precision at a time.
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

    A zero update has no direction: its cosine with every other is 0. The diagonal is 1.
    """
    norms = np.sqrt(np.diag(gram))
    scale = np.outer(norms, norms)
    alpha: np.ndarray = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)
    # A matrix product may round the two halves differently; linkage wants them equal.
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
    """Return ‖Σ p_i Δ_i‖ and max_i ‖Δ_i‖, what :func:`should_split` compares.

    Parameters
    ----------
    gram : np.ndarray
        Inner products of the cluster's updates, shape (n, n), n at least 1.
    weights : np.ndarray, optional
        Weights of the mean, shape (n,), need not add up to 1; the same for all by default.
    """
    shares = np.ones(len(gram)) if weights is None else np.asarray(weights, np.float64)
    shares = shares / shares.sum()
    # Rounding may leave a mean that cancels slightly below zero.
    mean = max(float(shares @ gram @ shares), 0.0)
    return mean**0.5, float(np.diag(gram).max()) ** 0.5


def should_split(norm_of_mean: float, max_norm: float, size: int, round_: int, settings: Settings) -> bool:
    """Say whether a cluster is stationary as a whole while some of its clients are not.

    Parameters
    ----------
    norm_of_mean : float
        ‖mean of the members' updates‖, to be below `cfl-mean-norm` (eps1).
    max_norm : float
        Norm of the longest update, to be above `cfl-max-norm` (eps2).
    size : int
        Members; 2 or fewer are never parted.
    round_ : int
        Round of the updates, to be at least `cfl-from-round`.
    settings : Settings
        The run's configuration.
    """
    return (
        size > 2
        and round_ >= settings.cfl_from_round
        and norm_of_mean < settings.cfl_mean_norm
        and max_norm > settings.cfl_max_norm
    )


def bipartition(similarity: np.ndarray, linkage: Linkage = "single") -> tuple[list[int], list[int]]:
    """Part clients into two groups of small similarity across.

    Single linkage minimises the largest similarity across the groups, the optimum of the paper's
    equation for the bipartition: it joins what is most similar until two groups are left, so any
    other cut would part a pair at least as similar. Complete linkage, which the authors' code uses,
    makes compact groups and only mostly attains that optimum.

    Parameters
    ----------
    similarity : np.ndarray
        Symmetric, within [−1, 1], shape (n, n), n at least 2.
    linkage : {"single", "complete"}
        Setting `cfl-linkage`.

    Returns
    -------
    tuple[list[int], list[int]]
        Positions of the two groups, rising, none empty; the first group holds position 0.

    Raises
    ------
    ValueError
        If there are fewer than 2 clients, or a similarity is not finite.
    """
    if len(similarity) < 2:
        raise ValueError(f"{len(similarity)} client(s) cannot be parted in two")
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
    """Return ĵ = argmin_j F_i(θ_j): the model a client belongs to; of equal ones the first.

    Raises
    ------
    ValueError
        If no loss is a number. Models whose loss is not finite are passed over.
    """
    values = np.asarray(losses, np.float64)
    if not np.isfinite(values).any():
        raise ValueError("no model has a finite loss")
    return int(np.argmin(np.where(np.isfinite(values), values, np.inf)))


def well_spread(assignments: Sequence[int], clusters: int, least_share: float | None = None) -> bool:
    """Say whether every cluster drew enough clients for the initial models to be kept.

    Models that start too much alike, or one that starts best for everyone, leave the others without
    members for good. So the authors draw initial models until each attracts its share.

    Parameters
    ----------
    assignments : sequence of int
        Model each client is nearest to, in ``range(clusters)``.
    clusters : int
        Number of models.
    least_share : float, optional
        Share of the clients that each model must draw. The authors' code asks for 35 % with two models
        and 10 % with four; the default follows it, with ``0.4 / clusters`` for other numbers.

    Raises
    ------
    ValueError
        If an assignment names no model.
    """
    members = np.bincount(np.asarray(assignments, np.int64), minlength=clusters)
    if len(members) > clusters:
        raise ValueError(f"a client is assigned to model {len(members) - 1}, there are {clusters}")
    if least_share is None:
        least_share = 0.35 if clusters == 2 else 0.4 / clusters
    # With some slack for rounding: 0.4 / 7 · 105 comes out above 6.
    return bool((members >= least_share * len(assignments) - 1e-9).all()) and len(assignments) > 0
