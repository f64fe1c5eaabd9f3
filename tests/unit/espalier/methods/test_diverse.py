from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.methods.divfl import cost, distances, greedy, lazy_greedy, refresh, sketch, stochastic_greedy


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def random_table(size: int, seed: int) -> np.ndarray:
    return distances(rng(seed).standard_normal((size, 3)))


def plain_greedy(table: np.ndarray, count: int) -> list[int]:
    """Follow the definition: try everyone, take the first of least G(S)."""
    chosen: list[int] = []
    for _ in range(count):
        left = [i for i in range(len(table)) if i not in chosen]
        costs = [sum(min(table[k, j] for j in [*chosen, i]) for k in range(len(table))) for i in left]
        chosen.append(left[costs.index(min(costs))])
    return chosen


# --- distances -------------------------------------------------------------------------------------


def test_distances_by_hand() -> None:
    table = distances(np.array([[0, 0], [3, 4], [0, 1]], np.float32))
    far = math.sqrt(18)
    np.testing.assert_allclose(table, np.array([[0, 5, 1], [5, 0, far], [1, far, 0]]))


def test_gradients_that_are_almost_alike_keep_their_distance() -> None:
    table = distances(np.array([[1e6, 1.0], [1e6, 1.001]]))
    assert table[0, 1] == pytest.approx(1e-3, rel=1e-6)


def test_refreshed_rows_are_those_of_a_new_table() -> None:
    gradients = rng(0).standard_normal((9, 5)).astype(np.float32)
    table = distances(gradients)
    gradients[[2, 7]] = rng(1).standard_normal((2, 5))
    refresh(table, gradients, [2, 7])
    np.testing.assert_array_equal(table, distances(gradients))


# --- choosing --------------------------------------------------------------------------------------


def test_choice_by_hand() -> None:
    # Clients on a line, three near its start and two far away.
    place = np.array([[0.0], [1.0], [2.0], [10.0], [11.0]])
    table = distances(place)
    # Sums of the columns: 24, 21, 20, 28, 32. Then client 3 leaves 2+1+0+0+1 and client 4 as much: the first.
    assert greedy(table, 2) == lazy_greedy(table, 2) == [2, 3]
    assert cost(table, [2, 3]) == 4.0
    assert cost(table, [1, 3]) == 3.0  # greedy is no optimum


@given(st.integers(1, 14), st.integers(0, 10**6), st.booleans(), st.data())
def test_lazy_is_greedy(size: int, seed: int, ties: bool, data: st.DataObject) -> None:
    # Whole distances make ties; they need not be a metric, nor symmetric.
    table = rng(seed).integers(0, 4, (size, size)).astype(float) if ties else random_table(size, seed)
    count = data.draw(st.integers(1, size))
    chosen = greedy(table, count)
    assert len(set(chosen)) == count
    assert lazy_greedy(table, count) == chosen
    assert stochastic_greedy(table, count, size, rng(seed)) == chosen  # everyone is in the pool
    if ties:  # sums of whole numbers are exact, so the reference sees the same ties
        assert plain_greedy(table, count) == chosen
    else:
        assert cost(table, chosen) == pytest.approx(cost(table, plain_greedy(table, count)))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_greedys_utility_is_close_to_the_optimum(count: int) -> None:
    for seed in range(40):
        table = random_table(9, seed) if seed % 2 else rng(seed).uniform(0, 1, (9, 9))
        best = min(cost(table, list(s)) for s in itertools.combinations(range(9), count))
        ceiling = 9 * table.max()
        utility, optimum = ceiling - cost(table, greedy(table, count)), ceiling - best
        assert (1 - 1 / math.e) * optimum <= utility <= optimum + 1e-9
        if count == 1:
            assert utility == pytest.approx(optimum)


def test_stochastic_greedy_draws_from_a_pool() -> None:
    table = random_table(30, 4)
    for seed in range(10):
        chosen = stochastic_greedy(table, 5, 8, rng(seed))
        assert chosen == stochastic_greedy(table, 5, 8, rng(seed))
        assert len(set(chosen)) == 5
        assert set(chosen) <= set(range(30))
    costs = [cost(table, stochastic_greedy(table, 5, 8, rng(seed))) for seed in range(50)]
    blind = [cost(table, [int(i) for i in rng(seed).choice(30, 5, replace=False)]) for seed in range(50)]
    assert cost(table, greedy(table, 5)) < np.mean(costs) < np.mean(blind)
    everyone = [stochastic_greedy(table, 30, 1, rng(seed)) for seed in range(2)]
    assert [sorted(c) for c in everyone] == [list(range(30))] * 2
    assert everyone[0] != everyone[1]  # a pool of one is a random order


def test_what_cannot_be_chosen() -> None:
    table = random_table(4, 0)
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"{count} clients to choose of 4"):
            greedy(table, count)
        with pytest.raises(ValueError, match=f"{count} clients to choose of 4"):
            lazy_greedy(table, count)
    with pytest.raises(ValueError, match="pool of 0"):
        stochastic_greedy(table, 2, 0, rng(0))


# --- sketches --------------------------------------------------------------------------------------


def test_a_short_vector_is_kept() -> None:
    vector = np.array([[1.0, -2.0], [3.0, 4.0]])
    kept = sketch(vector, 4, 1)
    assert kept.dtype == np.float32
    assert kept.tolist() == [1, -2, 3, 4]


def test_a_sketch_is_linear_and_the_seed_settles_it() -> None:
    x, y = rng(1).standard_normal((2, 600_000)).astype(np.float32)
    np.testing.assert_allclose(
        sketch(2 * x - y, 64, 7), 2 * sketch(x, 64, 7) - sketch(y, 64, 7), atol=1e-2, rtol=1e-4
    )
    np.testing.assert_array_equal(sketch(x, 64, 7), sketch(x.reshape(600, 1000), 64, 7))
    assert not np.array_equal(sketch(x, 64, 7), sketch(x, 64, 8))


def test_every_coordinate_goes_to_one_sum_with_its_sign() -> None:
    ones = np.eye(200, dtype=np.float32)
    rows = np.stack([sketch(row, 16, 3) for row in ones])
    assert (np.abs(rows).sum(axis=1) == 1).all()
    assert 60 < (rows.sum(axis=1) == 1).sum() < 140  # about half are positive
    assert (np.abs(rows).sum(axis=0) > 0).all()


def test_sketched_distances_are_close_to_the_true_ones() -> None:
    gradients = rng(5).standard_normal((12, 20_000)).astype(np.float32) * rng(6).uniform(0.1, 3, (12, 1))
    dim = 1024
    sketched = np.stack([sketch(g, dim, 99) for g in gradients])
    assert sketched.shape == (12, dim)
    true, seen = distances(gradients), distances(sketched)
    pairs = np.triu_indices(12, 1)
    ratio = seen[pairs] / true[pairs]
    # The square has a standard deviation of √(2/1024) = 4.4 %, the distance half of that.
    assert (np.abs(ratio - 1) < 4.5 * 0.022).all()
    assert abs(ratio.mean() - 1) < 0.022


def test_the_squared_length_is_kept_on_average() -> None:
    x = rng(2).standard_normal(300).astype(np.float32)
    squares = [float(np.sum(sketch(x, 32, seed).astype(np.float64) ** 2)) for seed in range(600)]
    norm = float(np.sum(x.astype(np.float64) ** 2))
    assert abs(np.mean(squares) - norm) < 4 * np.std(squares) / math.sqrt(600)
    assert np.std(squares) <= 1.15 * math.sqrt(2 / 32) * norm
