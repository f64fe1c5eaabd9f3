"""Statistical Homogeneity (SH): how close a label distribution is to uniform (FedPhD, arXiv 2507.06449)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from espalier.config.fields import SettingsGroup

Form = Literal["root", "squared"]


class ScoreSettings(SettingsGroup):
    """The score of label distributions."""

    homogeneity_form: Literal["root", "squared"] = Field(
        default="root", description="form of the statistical homogeneity score"
    )


def sh_score(counts: np.ndarray, form: Form = "root") -> float:
    """Return the SH score mu = 2 - ||q - u||_2 of a label histogram.

    Parameters
    ----------
    counts : np.ndarray
        Label counts or a distribution, shape (classes,). All zeros count as uniform: the
        prior of an edge without clients.
    form : {"root", "squared"}
        "root" is the norm, as in the authors' code; "squared" has no root.

    Returns
    -------
    float
        2 for a uniform distribution; it decreases with the distance from it.
    """
    total = float(counts.sum())
    if total == 0.0:
        return 2.0
    distance = float(np.sum((counts / total - 1.0 / len(counts)) ** 2))
    return 2.0 - (distance**0.5 if form == "root" else distance)


def edge_probabilities(
    client: np.ndarray, edges: Sequence[np.ndarray], *, a: float, b: float, form: Form = "root"
) -> np.ndarray:
    """Return p_e ∝ ReLU(a·mu(q'_e) − n_e + b), the probability of each edge for a client.

    q'_e is the edge's label distribution including the client, n_e its samples without the client. A small constant
    makes the distribution uniform if every ReLU is 0.

    Parameters
    ----------
    client : np.ndarray
        The client's label counts, shape (classes,).
    edges : sequence of np.ndarray
        Label counts accumulated at each edge since the last central aggregation, shape (classes,).
    a, b : float
        `selection-a` and `selection-b`.
    form : {"root", "squared"}
        See :func:`sh_score`.

    Returns
    -------
    np.ndarray
        Probabilities, shape (len(edges),).
    """
    scores = [max(a * sh_score(q + client, form) - float(q.sum()) + b, 0.0) + 1e-8 for q in edges]
    return np.asarray(scores) / sum(scores)
