from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.homogeneity import edge_weights
from common.methods.aggregation import CHUNK, HomogeneityWeighted, RunningMean, SampleWeighted, Update
from common.wire.payload import Weights


def update(
    name: str, value: float, samples: float, labels: tuple[float, ...] = (1, 1), last: float = 0
) -> Update:
    weights = Weights.pack({"w": np.full(3, value, np.float32)})
    return Update(name, weights, samples, np.array(labels, dtype=float), last)


def value_of(weights: Weights | None) -> float:
    assert weights is not None
    return float(weights.views()["w"][0])


def test_fedavg_by_hand() -> None:
    mean = SampleWeighted()
    mean.accept(update("a", 1.0, 10))
    mean.accept(update("b", 4.0, 30))
    assert value_of(mean.result()) == pytest.approx((10 * 1 + 30 * 4) / 40)
    assert mean.shares() == pytest.approx({"a": 0.25, "b": 0.75})


def test_nothing_to_add_up() -> None:
    assert SampleWeighted().result() is None
    nobody = SampleWeighted()
    nobody.accept(update("a", 1.0, 0))
    assert nobody.result() is None


@given(
    st.lists(st.tuples(st.floats(-10, 10), st.integers(1, 1000)), min_size=2, max_size=8), st.integers(1, 7)
)
def test_edge_sums_merge_into_the_flat_mean(clients: list[tuple[float, int]], cut: int) -> None:
    """Sums that merge: means of two edges, weighted by samples, are the mean of all clients."""
    cloud = SampleWeighted()
    for part in (clients[:cut], clients[cut:]):
        edge = SampleWeighted()
        for value, samples in part:
            edge.accept(update("k", value, samples))
        if (mean := edge.result()) is not None:
            cloud.accept(Update("e", mean, sum(n for _, n in part), np.ones(2)))
    total = sum(n for _, n in clients)
    expected = sum(np.float32(v) * n for v, n in clients) / total
    assert value_of(cloud.result()) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_homogeneity_weighted_by_hand() -> None:
    cloud = HomogeneityWeighted(a=10.0, b=5.0)
    cloud.accept(update("e1", 1.0, 20, (10, 10)))
    cloud.accept(update("e2", 3.0, 30, (30, 0)))
    first, second = 20 + 20 + 5, 30 + 10 * (2 - 0.5**0.5) + 5
    assert value_of(cloud.result()) == pytest.approx((first * 1 + second * 3) / (first + second))


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=4),
    st.floats(-100, 100),
    st.floats(-200, 200),
)
def test_homogeneity_weighted_is_rho(labels: list[tuple[int, int]], a: float, b: float) -> None:
    """The streaming sum gives rho_e of the formula, in any order of arrival."""
    samples = [float(sum(q)) for q in labels]
    if sum(samples) == 0:
        return
    rho = edge_weights(samples, [np.array(q, dtype=float) for q in labels], a=a, b=b)
    for order in itertools.permutations(range(len(labels))):
        cloud = HomogeneityWeighted(a, b)
        for i in order:
            cloud.accept(update(f"e{i}", float(i), samples[i], labels[i]))
        shares = cloud.shares()
        assert [shares.get(f"e{i}", 0.0) for i in range(len(labels))] == pytest.approx(rho.tolist())
        assert value_of(cloud.result()) == pytest.approx(sum(i * r for i, r in enumerate(rho)), abs=1e-4)


def test_last_round_count() -> None:
    cloud = HomogeneityWeighted(a=0.0, b=0.0, count="last-round")
    cloud.accept(update("e1", 1.0, 100, last=10))
    cloud.accept(update("e2", 2.0, 100, last=30))
    assert cloud.shares() == pytest.approx({"e1": 0.25, "e2": 0.75})


def test_integers_are_not_averaged() -> None:
    mean = RunningMean()
    mean.add("a", Weights.pack({"n": np.array([3, 9]), "m": np.array([True, False])}), 1)
    mean.add("b", Weights.pack({"n": np.array([4, 2]), "m": np.array([False, False])}), 9)
    result = mean.mean()
    assert result is not None
    assert result.views()["n"].tolist() == [4, 9]
    assert result.views()["n"].dtype == np.int64
    assert result.views()["m"].tolist() == [True, False]


def test_other_shapes_are_refused_and_never_broadcast() -> None:
    mean = RunningMean()
    mean.add("a", Weights.pack({"w": np.ones((2, 2), np.float32)}), 1)
    with pytest.raises(ValueError, match=r"'w' is float32\[1, 1\], expected float32\[2, 2\]"):
        mean.add("b", Weights.pack({"w": np.ones((1, 1), np.float32)}), 1)
    assert mean.weight == 1


def test_half_precision_is_summed_in_single() -> None:
    mean = RunningMean()
    for i in range(1000):
        mean.add(str(i), Weights.pack({"w": np.full(1, 1.001, np.float16)}), 100)
    result = mean.mean()
    assert result is not None
    assert result.views()["w"].dtype == np.float16
    assert float(result.views()["w"][0]) == float(np.float16(1.001))


def test_longer_than_a_chunk() -> None:
    values = np.random.default_rng(0).normal(size=2 * CHUNK + 17).astype(np.float32)
    mean = RunningMean()
    mean.add("a", Weights.pack({"w": values}), 1)
    mean.add("b", Weights.pack({"w": values}), 3)
    result = mean.mean()
    assert result is not None
    np.testing.assert_allclose(result.views()["w"], values, rtol=1e-6)


def test_negative_weight() -> None:
    with pytest.raises(ValueError, match="negative"):
        RunningMean().add("a", Weights.pack({"w": np.ones(1)}), -1)
