from __future__ import annotations

import numpy as np
import pytest

from espalier.methods.homogeneity import edge_probabilities, sh_score


def test_known_scores() -> None:
    # By hand: 2 of 10 classes 1.368, 1 of 4 classes 1.134, uniform 2.
    two_of_ten = np.array([5, 5, 0, 0, 0, 0, 0, 0, 0, 0])
    assert sh_score(two_of_ten) == pytest.approx(1.368, abs=5e-4)
    assert sh_score(np.array([7, 0, 0, 0])) == pytest.approx(1.134, abs=5e-4)
    assert sh_score(np.full(10, 3)) == 2.0
    # Without the root: sum of squares is 2·0.4² + 8·0.1² = 0.4.
    assert sh_score(two_of_ten, "squared") == pytest.approx(1.6)


def test_no_participants_count_as_uniform() -> None:
    assert sh_score(np.zeros(10)) == 2.0


def test_edge_probabilities_by_hand() -> None:
    # Edge A is empty; edge B has 2 samples of class 0. The client holds 2 of class 1.
    # A: q' = (0, 2), mu = 2 - sqrt(.5); B: q' = (2, 2), mu = 2; n_A = 0, n_B = 2.
    p = edge_probabilities(np.array([0.0, 2.0]), [np.zeros(2), np.array([2.0, 0.0])], a=10.0, b=1.0)
    a, b = 10 * (2 - 0.5**0.5) + 1, 10 * 2 - 2 + 1
    assert p == pytest.approx([a / (a + b), b / (a + b)])


def test_all_zero_is_a_coin_flip() -> None:
    full = np.array([1e6, 1e6])
    assert edge_probabilities(np.ones(2), [full, full], a=1.0, b=0.0) == pytest.approx([0.5, 0.5])
    assert edge_probabilities(np.ones(2), [full, np.zeros(2)], a=0.0, b=0.0) == pytest.approx([0.5, 0.5])
