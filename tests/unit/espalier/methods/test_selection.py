"""Client selection: sampling rules and shares of edges."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.methods.planning import pick_clients
from espalier.methods.selection import Proportional, shares, top
from tests.support.selections import chi_square, members_with, names, selection_of


@pytest.mark.parametrize("fraction", [0.01, 0.3, 1.0])
def test_uniform_is_the_plain_draw(fraction: float) -> None:
    members = members_with([5] * 10)
    selection = selection_of("uniform", fraction=fraction, seed=7)
    for round_ in range(1, 6):
        picks = selection.candidates(round_, members[::-1])
        assert names(picks) == names(pick_clients(members, fraction, 7, round_))
        assert selection.choose(round_, picks, {}) == picks
        assert selection.later(round_, members) == (picks, 0)
    assert selection.weighting == "samples"
    assert selection.probe == ""


def test_proportional_draws_by_samples() -> None:
    """Two draws of chances .5, .3, .2: the pairs' chances are products; duplicates collapse."""
    members = members_with([5, 3, 2])
    p = {"c00": 0.5, "c01": 0.3, "c02": 0.2}
    expected: dict[tuple[str, ...], float] = {}
    for a, b in itertools.product(p, p):
        key = tuple(sorted({a, b}))
        expected[key] = expected.get(key, 0.0) + p[a] * p[b]
    found: Counter[tuple[str, ...]] = Counter()
    selection = selection_of("proportional", fraction=0.67, seed=3)
    assert isinstance(selection, Proportional)
    for round_ in range(1, 3001):
        drawn = selection.draws(round_, members)
        assert sum(drawn.values()) == 2
        picks = names(selection.candidates(round_, members))
        assert picks == list(drawn)
        found[tuple(picks)] += 1
    assert chi_square(found, expected) < 20.5  # 5 degrees of freedom, 0.1 %
    assert selection.weighting == "uniform"


def test_bernoulli() -> None:
    members = members_with([1] * 20)
    selection = selection_of("bernoulli", fraction=0.3, seed=1)
    counts = [len(selection.candidates(r, members)) for r in range(1, 401)]
    # 8000 coins of chance 0.3: standard deviation sqrt(8000 * 0.21) = 41
    assert abs(sum(counts) - 2400) < 4 * 41
    # binomial variance 20 * 0.21 = 4.2; a fixed number would have none
    assert 3.2 < np.var(counts) < 5.3
    alone = selection_of("bernoulli", fraction=1e-9, seed=1)
    found = Counter(names(alone.candidates(r, members))[0] for r in range(1, 401))
    assert all(len(alone.candidates(r, members)) == 1 for r in range(1, 401))
    assert len(found) == 20
    everyone = selection_of("bernoulli", fraction=1.0, seed=1)
    assert everyone.candidates(1, members) == members


def test_bernoulli_coin_does_not_depend_on_the_others() -> None:
    selection = selection_of("bernoulli", fraction=0.5, seed=9)
    few, many = members_with([1] * 10), members_with([1] * 30)
    for round_ in range(1, 20):
        of_few, of_many = (set(names(selection.candidates(round_, c))) for c in (few, many))
        if len(of_few) > 1:
            assert of_few == of_many & set(names(few))


def test_top() -> None:
    values = {"b": 1.0, "a": 1.0, "d": math.inf, "c": math.nan, "e": -2.0}
    assert top(values, 5) == ["d", "a", "b", "e", "c"]
    assert top(values, 2) == ["d", "a"]
    assert top(values, 0) == []
    assert top({}, 3) == []


def test_shares_by_hand() -> None:
    # 5 of 10: 3.5, 1, 0.5 -> 3, 1, 0 and one left; remainders of a and c are equal, so a has it
    assert shares({"a": 7, "b": 2, "c": 1}, 5) == {"a": 4, "b": 1, "c": 0}
    # 4 of 9: 2.22, 1.33, 0.44 -> 2, 1, 0 and the one left to c
    assert shares({"a": 5, "b": 3, "c": 1}, 4) == {"a": 2, "b": 1, "c": 1}
    assert shares({"a": 2, "b": 1}, 7) == {"a": 2, "b": 1}
    assert shares({}, 3) == {}


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(0, 30)), st.integers(0, 60))
def test_shares_add_up(counts: dict[str, int], m: int) -> None:
    parts = shares(counts, m)
    total = sum(counts.values())
    assert sum(parts.values()) == min(m, total)
    for edge, count in counts.items():
        assert 0 <= parts[edge] <= count
        if m < total:
            assert abs(parts[edge] - m * count / total) < 1


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="no selection is called 'auto'"):
        selection_of("auto")
