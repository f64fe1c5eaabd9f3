"""Aggregation as sums that merge: an update is added when it arrives, and one model's memory is enough."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from common.homogeneity import Form, sh_score
from common.wire.payload import STORED_AS, Layout, Weights

#: Elements added at a time: small enough that the product stays in cache, so a sum needs no second model.
CHUNK = 1 << 18


@dataclass(frozen=True)
class Update:
    """What an aggregator is given: a client's reply at an edge, an edge's report at the cloud.

    Attributes
    ----------
    name : str
        Who sent it.
    weights : Weights
        The model it trained or aggregated.
    samples : float
        Training samples behind it (n_k or n_e).
    labels : np.ndarray
        Label counts behind it, shape (classes,).
    last_samples : float
        Those of the last round alone; differs from `samples` in an edge's report of several rounds.
    metrics : Mapping[str, float]
        Further scalars of the method.
    """

    name: str
    weights: Weights
    samples: float
    labels: np.ndarray
    last_samples: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)


class RunningMean:
    """A weighted mean of payloads that holds one sum, whatever the number of updates.

    Floating-point tensors are averaged; integer and boolean ones (counters, masks) take the
    element-wise maximum, which merges in any order and never makes a fraction of a counter.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self._layout: Layout | None = None
        self._sums: dict[str, np.ndarray] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, weights: Weights, weight: float) -> None:
        """Add one sender's payload.

        Raises
        ------
        ValueError
            If its layout is not that of the payloads before it, or the weight is negative.
        """
        if weight < 0:
            raise ValueError(f"a negative aggregation weight ({weight})")
        if self._layout is None:
            self._layout = weights.layout
            self._sums = {d: _zeros(d, n) for d, n in weights.layout.lengths.items()}
        elif fault := self._layout.difference(weights.layout):
            raise ValueError(fault)
        self.weight += weight
        self._weights[name] = self._weights.get(name, 0.0) + weight
        for dtype, buffer in weights.buffers.items():
            if self._sums[dtype].dtype.kind == "f":
                _add_scaled(self._sums[dtype], buffer, weight)
            else:
                np.maximum(self._sums[dtype], buffer, out=self._sums[dtype])

    def shares(self) -> dict[str, float]:
        """Return each sender's share of the mean."""
        return {name: w / self.weight for name, w in self._weights.items()} if self.weight else {}

    def mean(self) -> Weights | None:
        """Return the mean so far, None while nothing of positive weight was added."""
        if self._layout is None or self.weight == 0:
            return None
        buffers = {}
        for dtype, total in self._sums.items():
            mean = total / total.dtype.type(self.weight) if total.dtype.kind == "f" else total
            buffers[dtype] = mean.astype(STORED_AS[dtype], copy=False)
        return Weights(self._layout, buffers)


def _zeros(dtype: str, length: int) -> np.ndarray:
    """Return an empty sum: half precision is summed in single."""
    if dtype == "bfloat16":
        raise ValueError("bfloat16 payloads must be decoded before they are added up")
    stored = STORED_AS[dtype]
    if stored.kind == "i":
        return np.full(length, np.iinfo(str(stored)).min, stored)
    return np.zeros(length, np.float32 if dtype == "float16" else stored)


def _add_scaled(total: np.ndarray, buffer: np.ndarray, weight: float) -> None:
    """Add weight·buffer to total in place, chunk by chunk."""
    product = np.empty(min(CHUNK, len(total)), total.dtype)
    factor = total.dtype.type(weight)
    for start in range(0, len(total), CHUNK):
        part = buffer[start : start + CHUNK]
        scaled = product[: len(part)]
        np.multiply(part, factor, out=scaled)
        total[start : start + CHUNK] += scaled


class Aggregation(ABC):
    """How updates become one model; the same contract at an edge and at the cloud."""

    @abstractmethod
    def accept(self, update: Update) -> None:
        """Add an update; it may be freed afterwards."""

    @abstractmethod
    def result(self) -> Weights | None:
        """Return the aggregated model, None if no update had any weight."""

    @abstractmethod
    def shares(self) -> dict[str, float]:
        """Return each sender's share of the result; they add up to 1."""


class SampleWeighted(Aggregation):
    """FedAvg's mean, weighted by training samples (McMahan et al. 2017, arXiv 1602.05629, Algorithm 1)."""

    def __init__(self) -> None:
        self._mean = RunningMean()

    def accept(self, update: Update) -> None:
        """Add n_k · w_k."""
        self._mean.add(update.name, update.weights, update.samples)

    def result(self) -> Weights | None:
        """Return Σ n_k w_k / Σ n_k."""
        return self._mean.mean()

    def shares(self) -> dict[str, float]:
        """Return n_k / Σ n_k."""
        return self._mean.shares()


class HomogeneityWeighted(Aggregation):
    """FedPhD's central mean with rho_e ∝ ReLU(n_e + a·mu_e + b) (arXiv 2507.06449, Algorithm 1).

    Equals :func:`common.homogeneity.edge_weights`: edges whose ReLU is zero count, by n_e, only
    if every edge's is zero, and an edge without a sample never does.

    Parameters
    ----------
    a, b : float
        `aggregation-a` and `aggregation-b`.
    form : {"root", "squared"}
        Form of the SH score.
    count : {"window", "last-round"}
        Whether n_e counts the window's samples or, as the authors' code does, its last round's.
    """

    def __init__(self, a: float, b: float, form: Form = "root", count: str = "window") -> None:
        self.a, self.b, self.form, self.count = a, b, form, count
        self._mean = RunningMean()
        self._fallback = RunningMean()

    def accept(self, update: Update) -> None:
        """Add rho_e · w_e, not yet normalised."""
        n = update.samples if self.count == "window" else update.last_samples
        if n == 0:
            return
        rho = max(n + self.a * sh_score(update.labels, self.form) + self.b, 0.0)
        if rho > 0:
            self._mean.add(update.name, update.weights, rho)
        elif self._mean.weight == 0:
            self._fallback.add(update.name, update.weights, n)

    def result(self) -> Weights | None:
        """Return Σ rho_e w_e."""
        return (self._mean if self._mean.weight else self._fallback).mean()

    def shares(self) -> dict[str, float]:
        """Return rho_e."""
        return (self._mean if self._mean.weight else self._fallback).shares()
