"""Aggregation: every split of clients over edges gives what all clients give at once."""

from __future__ import annotations

import itertools
import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.methods.aggregate import COUNT, FORWARDED, NOMINAL, ROWS, SUMS, WEIGHTS, Aggregate, forwarded_in
from espalier.methods.base import ServerState, Update
from espalier.methods.homogeneity import sh_score
from espalier.methods.registry import create_method
from espalier.methods.run_config import RunConfig
from espalier.methods.scaffold import CONTROL
from espalier.wire.payload import Layout, TensorSpec, Weights
from espalier.wire.sections import GRADIENT, MODEL, Payload, SectionId
from espalier_proto import espalier_pb2 as pb
from espalier_server.window_outcome import CentralAggregate

SERVER: dict[str, np.ndarray] = {
    "w": np.full((4, 3, 2), 7, np.float32),
    "b": np.full(4, 8, np.float32),
    "n": np.array(9, np.int64),
    "k": np.array([-8, -9], np.int32),
}
LAYOUT = Layout.of(SERVER)
#: A section that clients' tensors are forwarded in, and that of the weights of the model's means.
ABOUT, GIVEN = SectionId("about"), MODEL._replace(record=WEIGHTS)


def means_of(tally: Aggregate, previous: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the means of the model's tensors."""
    return tally.means({MODEL: previous}).get(MODEL, {})


@dataclass(frozen=True)
class Client:
    """What one client replies: slices of the server's tensors (some of them), rows of `b` that count."""

    name: str
    arrays: dict[str, np.ndarray]
    weight: float
    rows: np.ndarray | None

    def add(self, tally: Aggregate) -> None:
        rows = {"b": self.rows} if self.rows is not None and "b" in self.arrays else None
        tally.mean({MODEL: self.arrays}, self.weight, rows={MODEL: rows or {}})
        tally.sum({MODEL: {n: a for n, a in self.arrays.items() if n in ("w", "b")}}, factor=0.5)
        tally.count("clients", 1)
        tally.count("loss", self.weight)
        tally.forward(self.name, {ABOUT: {"x": np.array([self.weight])}})

    def weight_at(self, name: str, index: tuple[int, ...]) -> float:
        """Return the weight with which it holds a coordinate."""
        array = self.arrays.get(name)
        if array is None or not all(i < n for i, n in zip(index, array.shape, strict=True)):
            return 0.0
        return 0.0 if name == "b" and self.rows is not None and not self.rows[index[0]] else self.weight


@st.composite
def clients(draw: st.DrawFn) -> list[Client]:
    made = []
    for i in range(draw(st.integers(1, 6))):
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        tall, wide = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        arrays: dict[str, np.ndarray] = {
            "w": rng.normal(size=(tall, wide, 2)).astype(np.float32),
            "b": rng.normal(size=tall).astype(np.float32),
            "n": np.asarray(rng.integers(0, 100), np.int64),
            "k": rng.integers(-50, 50, draw(st.integers(1, 2))).astype(np.int32),
        }
        kept = draw(st.sets(st.sampled_from(sorted(arrays))))
        weight = draw(st.sampled_from([0.0, 0.25, 1.0, 30.0, 977.0]))
        rows = rng.random(tall) < 0.5 if draw(st.booleans()) else None
        made.append(Client(f"c{i}", {n: a for n, a in arrays.items() if n in kept}, weight, rows))
    return made


def added(members: list[Client]) -> Aggregate:
    tally = Aggregate({MODEL: LAYOUT})
    for member in members:
        member.add(tally)
    return tally


def expected_mean(members: list[Client], name: str) -> np.ndarray:
    """Average by definition, one coordinate after the other, in double precision."""
    found = SERVER[name].astype(np.float64)
    for index in np.ndindex(found.shape):
        held = [(m.weight_at(name, index), m) for m in members]
        held = [(w, m) for w, m in held if w > 0]
        if not held:
            continue
        if SERVER[name].dtype.kind == "i":
            found[index] = max(m.arrays[name][index] for _, m in held)
        else:
            found[index] = sum(w * float(m.arrays[name][index]) for w, m in held) / sum(w for w, _ in held)
    return found


@given(clients(), st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_any_split_over_edges_is_the_flat_tally(members: list[Client], edge_of: list[int]) -> None:
    flat, cloud = added(members), Aggregate({MODEL: LAYOUT})
    for edge in range(4):
        below = [m for m, e in zip(members, edge_of, strict=False) if e == edge]
        cloud.absorb(*added(below).report())
    assert cloud.weight == pytest.approx(flat.weight)
    assert cloud.counts == pytest.approx(flat.counts)
    for tally in (flat, cloud):
        means = means_of(tally, SERVER)
        for name in SERVER:
            expected = expected_mean(members, name)
            mean = means.get(name, SERVER[name])
            assert mean.dtype == SERVER[name].dtype
            np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-5)
            held = np.array([any(m.weight_at(name, i) for m in members) for i in np.ndindex(mean.shape)])
            np.testing.assert_array_equal(
                np.broadcast_to(tally.held(name), mean.shape), held.reshape(mean.shape)
            )
        for name, total in tally.sums().get(MODEL, {}).items():
            by_hand = np.zeros(SERVER[name].shape)
            for m in members:
                if name in m.arrays:
                    by_hand[tuple(slice(0, n) for n in m.arrays[name].shape)] += 0.5 * m.arrays[name]
            np.testing.assert_allclose(total, by_hand, atol=1e-5)
        assert {c: s[ABOUT]["x"].tolist() for c, s in tally.forwarded.items()} == {
            m.name: [m.weight] for m in members
        }
    assert set(cloud.sums().get(MODEL, {})) == set(flat.sums().get(MODEL, {}))


def test_fedavg_by_hand() -> None:
    tally = Aggregate({MODEL: Layout.of({"w": np.zeros(3, np.float32)})})
    tally.mean({MODEL: {"w": np.full(3, 1, np.float32)}}, 10)
    tally.mean({MODEL: {"w": np.full(3, 4, np.float32)}}, 30)
    [mean] = means_of(tally, {}).values()
    np.testing.assert_allclose(mean, (10 * 1 + 30 * 4) / 40)


def test_widths_by_hand() -> None:
    """HeteroFL's rule on one tensor: the wide client alone holds what the narrow one lacks."""
    former = np.full((3, 3), 9, np.float32)
    tally = Aggregate({MODEL: Layout.of({"w": former})})
    tally.mean({MODEL: {"w": np.full((2, 2), 1, np.float32)}}, 1)
    tally.mean({MODEL: {"w": np.full((1, 1), 4, np.float32)}}, 2)
    np.testing.assert_array_equal(means_of(tally, {"w": former})["w"], [[3, 1, 9], [1, 1, 9], [9, 9, 9]])


def test_nobody_and_weight_nothing_leave_no_mean() -> None:
    tally = Aggregate({MODEL: LAYOUT})
    tally.mean({MODEL: SERVER}, 0)
    assert means_of(tally, SERVER) == {}
    assert tally.weight == 0
    assert not tally.held("w").any()
    report, scalars = tally.report()
    assert report.layouts == {}
    assert scalars == {NOMINAL: 0}


def test_scale_weighs_an_edge_and_neither_sums_nor_counts() -> None:
    reports = []
    for value, weight in ((1, 10), (4, 30)):
        edge = Aggregate({MODEL: Layout.of({"w": np.zeros(2, np.float32)})})
        edge.mean({MODEL: {"w": np.full(2, value, np.float32)}}, weight)
        edge.sum({MODEL: {"w": np.ones(2, np.float32)}})
        edge.count("clients", 1)
        reports.append(edge.report())
    cloud = Aggregate({MODEL: Layout.of({"w": np.zeros(2, np.float32)})})
    # 10·0.3 = 3 to 30·0.1 = 3: the edges count alike.
    cloud.absorb(*reports[0], scale=0.3)
    cloud.absorb(*reports[1], scale=0.1)
    np.testing.assert_allclose(means_of(cloud, {})["w"], 2.5)
    np.testing.assert_array_equal(cloud.sums()[MODEL]["w"], 2)
    assert cloud.weight == pytest.approx(6)
    assert cloud.counts == {"clients": 2}


# --- several rounds of a window ----------------------------------------------------------------------


def round_of(width: int, value: float, weight: float, counter: int, client: str) -> Aggregate:
    tally = Aggregate({MODEL: Layout.of({"w": np.zeros(3, np.float32), "n": np.array(0)})})
    tally.mean({MODEL: {"w": np.full(width, value, np.float32), "n": np.array(counter)}}, weight)
    tally.sum({MODEL: {"w": np.full(width, value, np.float32)}})
    tally.count("clients", 1)
    tally.forward(client, {ABOUT: {"x": np.array([value])}})
    return tally


def test_a_window_has_the_later_means_and_the_weights_of_all_rounds() -> None:
    tally = Aggregate({MODEL: Layout.of({"w": np.zeros(3, np.float32), "n": np.array(0)})})
    tally.extend(round_of(3, 1.0, 10, 5, "a"))
    tally.extend(round_of(2, 4.0, 30, 3, "b"))
    tally.extend(round_of(2, 6.0, 20, 4, "a"))
    means = means_of(tally, {})
    # The last coordinate was held in the first round only, and keeps what that made of it.
    np.testing.assert_allclose(means["w"], [6, 6, 1])
    assert means["n"] == 5
    np.testing.assert_allclose(tally.sums()[MODEL]["w"], [11, 11, 1])
    assert tally.weight == 60
    assert tally.counts == {"clients": 3}
    assert {c: s[ABOUT]["x"].tolist() for c, s in tally.forwarded.items()} == {"a": [6.0], "b": [4.0]}
    # At the cloud the window meets an edge whose one round held everything with weight 40.
    cloud = Aggregate({MODEL: Layout.of({"w": np.zeros(3, np.float32), "n": np.array(0)})})
    cloud.absorb(*tally.report())
    cloud.absorb(*round_of(3, 0.0, 40, 0, "c").report())
    np.testing.assert_allclose(means_of(cloud, {})["w"], [6 * 0.6, 6 * 0.6, 1 * 10 / 50], rtol=1e-6)


def test_extending_leaves_the_later_round_and_the_clouds_report_alone() -> None:
    tally = Aggregate({MODEL: LAYOUT})
    first, later = added([member(1.0)]), added([member(2.0)])
    before = means_of(later, SERVER)
    tally.extend(first)
    tally.extend(later)
    report, scalars = tally.report()
    tally.extend(added([member(5.0)]))
    np.testing.assert_array_equal(means_of(later, SERVER)["w"], before["w"])
    again = Aggregate({MODEL: LAYOUT})
    again.absorb(report, scalars)
    np.testing.assert_array_equal(means_of(again, SERVER)["w"], 2)


def member(value: float) -> Client:
    arrays = {"w": np.full((4, 3, 2), value, np.float32), "b": np.full(4, value, np.float32)}
    return Client("c", arrays, 3.0, None)


# --- what does not fit -------------------------------------------------------------------------------

WIDE = {"kernel": np.zeros((4, 4, 3, 3), np.float32), "bias": np.zeros(4, np.float32)}


@pytest.mark.parametrize(
    ("name", "array", "fault"),
    [
        (
            "kernel",
            np.ones((1, 1, 1, 1), np.float32),
            r"shape \[1, 1, 1, 1\], the server's is \[4, 4, 3, 3\]",
        ),
        ("kernel", np.ones((4, 4, 1, 1), np.float32), "shape"),
        ("kernel", np.ones((4, 5, 3, 3), np.float32), "shape"),
        ("kernel", np.ones((3, 3), np.float32), "shape"),
        ("kernel", np.float32(1), "shape"),
        ("bias", np.ones((4, 1), np.float32), "shape"),
        ("bias", np.ones(4, np.int64), "'bias' is int64, the server's is float32"),
        ("gain", np.ones(4, np.float32), "'gain' is not one of the server's"),
    ],
)
def test_what_numpy_would_broadcast_is_refused(name: str, array: np.ndarray, fault: str) -> None:
    tally = Aggregate({MODEL: Layout.of(WIDE)})
    whole = {n: np.ones_like(a) for n, a in WIDE.items()}
    tally.mean({MODEL: whole}, 1)
    array = np.asarray(array)
    with pytest.raises(ValueError, match=fault):
        tally.mean({MODEL: whole | {name: array}}, 1)
    with pytest.raises(ValueError, match=fault):
        tally.sum({MODEL: {name: array}})
    for section in (MODEL, MODEL._replace(record=SUMS)):
        with pytest.raises(ValueError, match=fault):
            tally.absorb(Payload.pack({section: {name: array}}), {NOMINAL: 1.0})
    # Nothing of the refused ones was added.
    assert tally.weight == 1
    np.testing.assert_array_equal(means_of(tally, WIDE)["kernel"], 1)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=2, max_size=5))
def test_mixed_widths_are_averaged_over_their_holders(sizes: list[tuple[int, int]]) -> None:
    """A narrow client's single column must not reach the columns it does not hold."""
    tally = Aggregate({MODEL: Layout.of(WIDE)})
    for i, (rows, columns) in enumerate(sizes):
        tally.mean({MODEL: {"kernel": np.full((rows, columns, 3, 3), i, np.float32)}}, 1)
    mean = means_of(tally, {"kernel": np.full_like(WIDE["kernel"], -1)})["kernel"]
    for r, c in itertools.product(range(4), range(4)):
        held = [i for i, (rows, columns) in enumerate(sizes) if r < rows and c < columns]
        np.testing.assert_allclose(mean[r, c], np.mean(held) if held else -1, rtol=1e-6)


def test_a_slice_of_an_edge_is_refused_at_the_cloud() -> None:
    """Edges report whole tensors and say by weights what was held."""
    report = Payload.pack({MODEL: {"bias": np.ones(2, np.float32)}})
    with pytest.raises(ValueError, match=r"'bias' has shape \[2\]"):
        Aggregate({MODEL: Layout.of(WIDE)}).absorb(report, {NOMINAL: 1.0})


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_bad_weights(weight: float) -> None:
    tally = Aggregate({MODEL: Layout.of(WIDE)})
    with pytest.raises(ValueError, match="weight"):
        tally.mean({MODEL: {"bias": np.ones(4, np.float32)}}, weight)
    payload = Payload.pack({MODEL: {"bias": np.ones(4, np.float32)}})
    with pytest.raises(ValueError, match="weight"):
        tally.absorb(payload, {NOMINAL: weight})
    with pytest.raises(ValueError, match="weight"):
        tally.absorb(payload, {NOMINAL: 1e-320}, scale=float("inf"))
    by_row = Payload.pack(
        {MODEL: {"bias": np.ones(4, np.float32)}, GIVEN: {"bias": np.array([1, 1, 1, weight])}}
    )
    with pytest.raises(ValueError, match="weights of tensor 'bias'"):
        tally.absorb(by_row, {NOMINAL: 1.0})
    assert means_of(tally, {}) == {}


def test_weights_of_another_shape_and_counts_that_are_no_numbers() -> None:
    tally = Aggregate({MODEL: Layout.of(WIDE)})
    payload = Payload.pack({MODEL: {"bias": np.ones(4, np.float32)}, GIVEN: {"bias": np.ones(2)}})
    with pytest.raises(ValueError, match=r"weights of tensor 'bias' have shape \[2\]"):
        tally.absorb(payload, {NOMINAL: 1.0})
    with pytest.raises(ValueError, match="count 'x' is not finite"):
        tally.absorb(Payload({}), {NOMINAL: 1.0, COUNT + "x": float("nan")})
    assert tally.counts == {}


def test_rows_must_be_the_tensors_own() -> None:
    tally = Aggregate({MODEL: Layout.of(WIDE)})
    with pytest.raises(ValueError, match="'bias' has shape"):
        tally.mean({MODEL: {"bias": np.ones(4, np.float32)}}, 1, rows={MODEL: {"bias": np.array([True])}})
    assert tally.weight == 0


def test_bfloat16_is_refused() -> None:
    tally = Aggregate({MODEL: Layout((TensorSpec("w", "bfloat16", (2,)),))})
    bits = np.ones(2, np.uint16)
    with pytest.raises(ValueError, match="bfloat16"):
        tally.mean({MODEL: {"w": bits}}, 1)
    with pytest.raises(ValueError, match="bfloat16"):
        tally.sum({MODEL: {"w": bits}})


def test_counters_are_never_averaged() -> None:
    arrays = [
        {"n": np.array([3, 9]), "m": np.array([True, False]), "u": np.array([1, 2], np.uint8)},
        {"n": np.array([4, -2]), "m": np.array([False, False]), "u": np.array([0, 9], np.uint8)},
    ]
    cloud = Aggregate({MODEL: Layout.of(arrays[0])})
    for part, weight in zip(arrays, (1, 9), strict=True):
        edge = Aggregate({MODEL: Layout.of(part)})
        edge.mean({MODEL: part}, weight)
        cloud.absorb(*edge.report(), scale=0.5)
    means = means_of(cloud, {n: np.zeros_like(a) for n, a in arrays[0].items()})
    assert {n: a.tolist() for n, a in means.items()} == {"n": [4, 9], "m": [True, False], "u": [1, 9]}
    assert {n: a.dtype for n, a in means.items()} == {n: a.dtype for n, a in arrays[0].items()}


def test_half_precision_is_summed_in_single() -> None:
    edge, cloud = (Aggregate({MODEL: Layout.of({"w": np.zeros(1, np.float16)})}) for _ in range(2))
    for _ in range(1000):
        edge.mean({MODEL: {"w": np.full(1, 1.001, np.float16)}}, 100)
        edge.sum({MODEL: {"w": np.full(1, 1.001, np.float16)}})
    cloud.absorb(*edge.report())
    mean = means_of(cloud, {"w": np.zeros(1, np.float16)})["w"]
    assert mean.dtype == np.float16
    assert float(mean[0]) == float(np.float16(1.001))
    assert float(cloud.sums()[MODEL]["w"][0]) == pytest.approx(1000 * float(np.float16(1.001)), rel=1e-4)


def test_forwarded_tensors_are_separate_by_client_section_and_name() -> None:
    tally = Aggregate({MODEL: LAYOUT})
    tally.forward("cam-7", {GRADIENT: {"conv.weight": np.ones(2)}, ABOUT: {"x": np.zeros(1)}})
    tally.forward("cam-7", {ABOUT: {"y": np.zeros(1)}})
    tally.forward("cam-8", {ABOUT: {"x": np.ones(1)}})
    report, _ = tally.report()
    found = forwarded_in(report)
    assert {c: {s: list(arrays) for s, arrays in own.items()} for c, own in found.items()} == {
        "cam-7": {GRADIENT: ["conv.weight"], ABOUT: ["x", "y"]},
        "cam-8": {ABOUT: ["x"]},
    }
    # All of it is one record of the message, with one Array for each dtype.
    assert {s.key for s in report} == {FORWARDED}
    assert [list(record) for record in report.to_records().values()] == [["float64"]]


def test_sections_are_aggregated_apart() -> None:
    """Tensors of one name in two sections, and in two members of one, share nothing."""
    one, two = SectionId("cluster", "1"), SectionId("cluster", "2")
    layout = Layout.of({"w": np.zeros(2, np.float32)})
    layouts = {MODEL: layout, one: layout, two: layout}
    edge, cloud = Aggregate(layouts), Aggregate(layouts)
    edge.mean({MODEL: {"w": np.full(2, 1, np.float32)}, one: {"w": np.full(2, 5, np.float32)}}, 2.0)
    edge.mean({one: {"w": np.full(1, 9, np.float32)}}, 2.0, counted=True)
    edge.sum({two: {"w": np.full(2, 3, np.float32)}}, 2.0)
    report, scalars = edge.report()
    assert scalars == {NOMINAL: 2.0}
    assert set(report) == {MODEL, one, one._replace(record=WEIGHTS), two._replace(record=SUMS)}
    cloud.absorb(report, scalars)
    means = cloud.means({s: {"w": np.zeros(2, np.float32)} for s in layouts})
    assert {s: a["w"].tolist() for s, a in means.items()} == {MODEL: [1, 1], one: [7, 5]}
    assert {s: a["w"].tolist() for s, a in cloud.sums().items()} == {two: [6, 6]}


@pytest.mark.parametrize(
    ("section", "fault"),
    [
        (SectionId("model", record="guesses"), "the unknown record 'guesses'"),
        (SectionId("other", record=ROWS), "the unknown section other of rows"),
        (SectionId("other"), "tensor 'bias' of other is not one of the server's"),
        (SectionId("other", record=SUMS), "tensor 'bias' of other is not one of the server's"),
        (SectionId("model", record=WEIGHTS), "weights of tensor 'bias' in model, which has no mean"),
    ],
)
def test_a_section_that_no_report_has_is_refused_and_adds_nothing(section: SectionId, fault: str) -> None:
    tally = Aggregate({MODEL: Layout.of(WIDE)})
    with pytest.raises(ValueError, match=fault):
        tally.absorb(Payload.pack({section: {"bias": np.ones(4, np.float32)}}), {NOMINAL: 1.0})
    assert tally.weight == 0
    assert tally.means({}) == tally.sums() == {}


def test_adding_many_updates_keeps_one_sum() -> None:
    """The edge's memory does not grow with its clients."""
    size = 10_000_000
    layout = Layout((TensorSpec("w", "float32", (size // 4,)),))
    tracemalloc.start()
    try:
        tally = Aggregate({MODEL: layout})
        for i in range(32):
            tally.mean({MODEL: {"w": np.full(size // 4, i, np.float32)}}, 1)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(means_of(tally, {})["w"][::100_000], 15.5)
    # One sum stays; while one is added there are the update, its product with the weight, and the sum.
    assert kept < 1.1 * size
    assert peak < 3.2 * size


# --- the cloud's share of each edge (FedPhD) ------------------------------------------------------------


def edge_report(value: float, samples: float) -> tuple[Payload, dict[str, float]]:
    edge = Aggregate({MODEL: Layout.of({"w": np.zeros(3, np.float32)})})
    edge.mean({MODEL: {"w": np.full(3, value, np.float32)}}, samples)
    return edge.report()


def central(
    edges: list[tuple[float, tuple[float, ...]]], order: tuple[int, ...], **more: bool | float | str
) -> tuple[float | None, dict[str, float]]:
    """Merge edges (last round's samples, labels) into the mean and the shares; edge i reports the value i."""
    method = create_method(RunConfig.from_flat({"method": "fedphd", **more}))
    merged = CentralAggregate({MODEL: Layout.of({"w": np.zeros(3, np.float32)})})
    for i in order:
        last, labels = edges[i]
        samples = float(sum(labels))
        if samples:
            share = method.edge_share(samples, last, np.array(labels, dtype=float))
            merged.absorb(f"e{i}", *edge_report(float(i), samples), share)
    tally, shares = merged.result()
    mean = means_of(tally, {}).get("w")
    return (None if mean is None else float(mean[0])), shares


def edge_weights(samples: list[float], labels: list[tuple[int, int]], a: float, b: float) -> np.ndarray:
    """Return rho_e = ReLU(n_e + a mu_e + b) / sum; proportional to n_e where every ReLU is zero."""
    n = np.array(samples)
    mu = np.array([sh_score(np.array(q, dtype=float)) for q in labels])
    rho = np.where(n > 0, np.maximum(n + a * mu + b, 0.0), 0.0)
    weights: np.ndarray = rho / rho.sum() if rho.sum() > 0 else n / n.sum()
    return weights


def test_homogeneity_weighted_by_hand() -> None:
    mean, shares = central(
        [(0, (10, 10)), (0, (30, 0))], (0, 1), **{"aggregation-a": 10.0, "aggregation-b": 5.0}
    )
    first, second = 20 + 20 + 5, 30 + 10 * (2 - 0.5**0.5) + 5
    assert shares == pytest.approx({"e0": first / (first + second), "e1": second / (first + second)})
    assert mean == pytest.approx(second / (first + second))


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=4),
    st.floats(-100, 100),
    st.floats(-200, 200),
)
def test_homogeneity_weighted_is_rho(labels: list[tuple[int, int]], a: float, b: float) -> None:
    """The merged tally has rho_e of the formula, in any order of arrival, all-zero shares included."""
    samples = [float(sum(q)) for q in labels]
    if sum(samples) == 0:
        return
    rho = edge_weights(samples, labels, a, b)
    edges: list[tuple[float, tuple[float, ...]]] = [(0.0, q) for q in labels]
    for order in itertools.permutations(range(len(labels))):
        mean, shares = central(edges, order, **{"aggregation-a": a, "aggregation-b": b})
        assert [shares.get(f"e{i}", 0.0) for i in range(len(labels))] == pytest.approx(rho.tolist())
        assert mean == pytest.approx(sum(i * r for i, r in enumerate(rho)), abs=1e-4)


def test_last_round_count() -> None:
    more: dict[str, float | str] = {
        "aggregation-a": 0.0,
        "aggregation-b": 0.0,
        "rho-count": "last-round",
    }
    _, shares = central([(10, (50, 50)), (30, (50, 50))], (0, 1), **more)
    assert shares == pytest.approx({"e0": 0.25, "e1": 0.75})


def test_nobody_reports() -> None:
    tally, shares = CentralAggregate({MODEL: Layout.of(SERVER)}).result()
    assert shares == {}
    assert means_of(tally, SERVER) == {}


# --- a method that needs to know its clients' step ------------------------------------------------------


@pytest.mark.parametrize("method", ["qfedavg", "scaffold"])
@pytest.mark.parametrize("known", [{}, {"lr-sum": 0.0}])
def test_a_client_without_a_step_size_is_refused(method: str, known: dict[str, float]) -> None:
    weights = Weights.pack({"w": np.zeros(2, np.float32)})
    spec = pb.ArchitectureSpec(tensors=weights.layout.to_proto().tensors)
    server = ServerState(spec, Payload.of(weights))
    server.add_section(CONTROL)
    tally = Aggregate(server.payload.layouts)
    one = {"w": np.ones(2, np.float32)}
    metrics = {"steps": 3.0, "loss": 1.0, "received-loss": 1.0, **known}
    update = Update("c", {MODEL: one}, {MODEL: weights.views()}, 10, np.ones(2), metrics)
    with pytest.raises(ValueError, match="sum of step sizes"):
        create_method(RunConfig.from_flat({"method": method, "model": "cnn"})).add(tally, update, server)
    assert tally.means(server.payload.views()) == {}


def test_only_edges_of_the_last_round_count() -> None:
    layout = Layout.of({"w": np.zeros(2, np.float32)})

    def told(value: float) -> tuple[Payload, dict[str, float]]:
        tally = Aggregate({MODEL: layout})
        tally.mean({MODEL: {"w": np.full(2, value, np.float32)}}, 1.0)
        return tally.report()

    values = {"old": (1.0, 7), "new": (2.0, 8), "late": (4.0, 8)}
    for order in (("old", "new", "late"), ("new", "late", "old"), ("new", "old", "late")):
        merged = CentralAggregate({MODEL: layout}, newest_only=True)
        for name in order:
            value, newest = values[name]
            merged.absorb(name, *told(value), None, newest)
        tally, shares = merged.result()
        np.testing.assert_allclose(means_of(tally, {"w": np.zeros(2, np.float32)})["w"], 3.0)
        assert shares == {"new": 0.5, "late": 0.5}
