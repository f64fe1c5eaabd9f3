"""Label histograms: counts by hand, noise that keeps them non-negative."""

from __future__ import annotations

import numpy as np
import pytest

from espalier.errors import DataError
from espalier_client.histogram import add_laplace_noise, label_histogram


def test_counts_by_hand() -> None:
    assert label_histogram([2, 0, 2, 2], 4).tolist() == [1, 0, 3, 0]
    assert label_histogram([], ("a", "b")).tolist() == [0, 0]
    assert label_histogram([0], 1).dtype == np.float64
    for bad in ([4], [-1]):
        with pytest.raises(DataError, match=f"label {bad[0]} lies outside 0 to 3"):
            label_histogram(bad, 4)


def test_noise_is_laplace_and_never_negative() -> None:
    counts = np.full(20_000, 100.0)
    noisy = add_laplace_noise(counts, 0.5, np.random.default_rng(0))
    # Epsilon 1/2 is Laplace(b=2), of mean 0 and variance 2 b^2; 100 samples away from zero nothing is cut.
    assert abs(noisy.mean() - 100) < 0.1
    assert abs(noisy.var() / 8 - 1) < 0.05
    low = add_laplace_noise(np.zeros(1000), 0.2, np.random.default_rng(1))
    assert low.min() == 0.0
    assert low.max() > 0.0


def test_an_epsilon_that_is_none_is_refused() -> None:
    for epsilon in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match="epsilon must be a finite number above 0"):
            add_laplace_noise(np.array([1.0, 2.0]), epsilon, np.random.default_rng(0))
