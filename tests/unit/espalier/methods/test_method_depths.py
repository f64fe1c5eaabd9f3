"""DepthFL and Split-Mix against their formulas and the authors' code; the guard of sub-models in means."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from espalier.methods.planning import Member
from espalier.methods.tally import Tally
from espalier.wire.payload import Weights
from tests.support.by_hand import corner, EDGES, Arrays, aggregate, method, reply, same, server, wave




# --- DepthFL ----------------------------------------------------------------------------------------

DEPTH = {
    "stage1.weight": (2, 2),
    "stage1.bias": (2,),
    "exit1.weight": (3, 2),
    "norm2.weight": (2,),
    "norm2.running_mean": (2,),
    "exit2.weight": (3, 2),
}
HELD = {1: tuple(DEPTH)[:3], 2: tuple(DEPTH)}
ALPHA, ROUNDS = 0.1, [[(0, 1), (3, 2)], [(1, 1), (2, 1)], [(0, 1), (4, 2), (5, 2)]]


def depth_replies(w: Arrays, round_: int) -> list[tuple[str, Arrays]]:
    return [
        (
            f"c{c}",
            {n: w[n] + 0.1 * wave(10 + 10 * round_ + c + list(DEPTH).index(n), *DEPTH[n]) for n in HELD[d]},
        )
        for c, d in ROUNDS[round_]
    ]


@EDGES
def test_depthfl_has_an_h_per_tensor_with_as_many_terms_as_holders(edges: int) -> None:
    """The reference's order: w̄ over H holders, h ← h − α (H/N)(w̄ − w), w ← w̄ − h/α; statistics without h.

    In float64, so that the two ways of adding up differ by rounding of that alone.
    """
    population = 6
    state = server(
        {n: wave(i, *s).astype(np.float64) for i, (n, s) in enumerate(DEPTH.items())},
        ["norm2.running_mean"],
        population,
    )
    rule = method("depthfl", model="depth-cnn", dyn_alpha=ALPHA)
    rule.before_run(state, lambda *_: {})
    w = {n: state.tensors[n].copy() for n in DEPTH}
    h = {n: np.zeros(s) for n, s in DEPTH.items()}
    for round_ in range(3):
        replies = depth_replies(w, round_)
        aggregate(rule, state, [reply(state, c, own, samples=5) for c, own in replies], edges)
        for name in DEPTH:
            holders = [own[name] for _, own in replies if name in own]
            if not holders:
                continue
            mean = np.mean(holders, axis=0)
            if name == "norm2.running_mean":
                w[name] = mean
                continue
            h[name] = h[name] - ALPHA * len(holders) * (mean - w[name]) / population
            w[name] = mean - h[name] / ALPHA
        same({n: state.tensors[n] for n in DEPTH}, w, atol=1e-12)
        same(state.section("dyn"), {n: v for n, v in h.items() if n != "norm2.running_mean"}, atol=1e-12)
    assert "dyn/norm2.running_mean" not in state.tensors


def test_depthfl_gives_the_numbers_of_its_authors_baseline() -> None:
    """Numbers of `aggregate` after three rounds, run on the same tensors.

    adap/flower@fdef7afb1dca3030553be302366cfd285ed6632c, baselines/depthfl/depthfl/strategy.py; N = 6, α = 0.1.
    """
    state = server({n: wave(i, *s) for i, (n, s) in enumerate(DEPTH.items())}, ["norm2.running_mean"], 6)
    rule = method("depthfl", model="depth-cnn", dyn_alpha=ALPHA)
    rule.before_run(state, lambda *_: {})
    for round_ in range(3):
        own = {n: state.tensors[n] for n in DEPTH}
        aggregate(rule, state, [reply(state, c, a, samples=5) for c, a in depth_replies(own, round_)])
    expected = {
        "stage1.weight": [
            [0.34671863019466403, 0.6080511599779128],
            [0.9468420341610907, 1.2580338386197878],
        ],
        "stage1.bias": [0.6663623621066413, 0.8330576797326404],
        "exit1.weight": [
            [0.8958170374234514, 0.6223226591944695],
            [-0.15917835434277855, -1.2598679915070532],
            [-0.7902880628903706, 0.171256739149491],
        ],
        "norm2.weight": [1.1270863945285479, 0.15581128050883616],
        "norm2.running_mean": [1.085355368256569, -0.5375501453876496],
        "exit2.weight": [
            [0.9738487641016641, -0.9535368204116821],
            [0.5661481221516926, 0.5143893281618754],
            [-1.1055808385213215, 0.6096900527675947],
        ],
    }
    same(state.tensors, {n: np.array(a) for n, a in expected.items()}, atol=1e-5)


# --- Split-Mix --------------------------------------------------------------------------------------


@EDGES
def test_split_mix_averages_each_base_by_samples_as_the_authors_code_does(edges: int) -> None:
    """Numbers of `SlimmableModelAccumulator`, whose base i is the i-th block on the diagonal.

    illidanlab/SplitMix@fa163f781cd0835eb7b017d3f8c763904f0d7618, federated/aggregation.py; 30 samples for the
    bases 0 and 1, 10 for base 1, 20 for base 3. Nobody trained base 2.
    """

    def bases(seed: int, chosen: Sequence[int]) -> Arrays:
        a, b = wave(seed, 8, 12), wave(seed + 1, 8)
        blocks = {f"base{i}.a": a[2 * i : 2 * i + 2, 3 * i : 3 * i + 3] for i in chosen}
        return blocks | {f"base{i}.b": b[2 * i : 2 * i + 2] for i in chosen}

    state = server(bases(0, range(4)))
    untouched = {n: state.tensors[n].copy() for n in ("base2.a", "base2.b")}
    trained: list[tuple[int, tuple[int, ...]]] = [(30, (0, 1)), (10, (1,)), (20, (3,))]
    replies = [
        reply(state, f"c{k}", bases(10 + 10 * k, own), samples=n) for k, (n, own) in enumerate(trained)
    ]
    aggregate(method("split-mix", model="mlp", base_width=0.25), state, replies, edges)
    expected = {
        "base0.a": [[-0.80066687, 0.9593749, -0.34887522], [0.47685668, 0.41808143, -0.97781014]],
        "base0.b": [-0.963131, 0.5182283],
        "base1.a": [[0.39207658, -0.92209846, 0.45296165], [-0.34618932, -0.5068364, 0.62741417]],
        "base1.b": [0.34973988, -0.4372343],
        "base3.a": [[-0.9334081, -0.10721946, 0.8354465], [-0.5759124, 0.4641288, 0.99996614]],
        "base3.b": [0.9315276, 0.4548648],
    }
    same(state.tensors, {n: np.array(a) for n, a in expected.items()})
    assert all(np.array_equal(state.tensors[n], a) for n, a in untouched.items())


def test_split_mix_gives_every_base_its_turn() -> None:
    """Every B consecutive first bases are all bases, and the others of a client are others, without repetition."""
    rule = method("split-mix", model="mlp", base_width=0.125, levels="0.5,0.125")
    names = [f"c{i}" for i in range(4)]
    members = {n: Member(n, 10, np.ones(3), ("edge-1",)) for n in names}
    alone: list[int] = []
    for round_ in range(1, 13):
        keys = rule.assign(server({"x": np.zeros(1, np.float32)}), names, members, round_)
        # The first half of the names has level 0.5, four bases; the others have one, which is their turn's.
        sets = {n: [int(b) for b in key.split(",")] for n, key in keys.items()}
        assert [len(sets[n]) for n in names] == [4, 4, 1, 1]
        assert all(len(set(own)) == len(own) and set(own) <= set(range(8)) for own in sets.values())
        alone += sets["c2"] + sets["c3"]
    # Four clients take four turns a round, so two rounds are one pass over the eight bases.
    small = method("split-mix", model="mlp", base_width=0.125, levels="0.125")
    turns: list[int] = []
    for round_ in range(1, 9):
        keys = small.assign(server({"x": np.zeros(1, np.float32)}), names, members, round_)
        turns += [int(keys[n]) for n in names]
    for start in range(0, len(turns), 8):
        assert sorted(turns[start : start + 8]) == list(range(8))
    assert turns[:8] != turns[8:16]  # shuffled anew for every pass
    assert set(alone) == set(range(8))


# --- the guard --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, 4), (5, 4), (4, 4, 1), (4,)])
def test_a_tensor_of_another_shape_is_never_broadcast(shape: tuple[int, ...]) -> None:
    """NumPy would broadcast most of these to (4, 4); a slice counts where it lies, anything else is refused."""
    before = wave(0, 4, 4)
    state = server({"w": before})
    tally = Tally(state.weights.layout)
    tally.mean({"w": np.full((4, 4), 2, np.float32)}, 1.0)
    small = np.full(shape, 6, np.float32)
    if len(shape) == 2 and shape[0] <= 4:
        tally.mean({"w": small}, 1.0)
        expected = np.full((4, 4), 2, np.float32)
        expected[: shape[0], : shape[1]] = 4
        assert np.array_equal(tally.means(state.tensors)["w"], expected)
    else:
        with pytest.raises(ValueError, match=r"tensor 'w' has shape .*, the server's is \[4, 4\]"):
            tally.mean({"w": small}, 1.0)


def test_a_tensor_beyond_two_dimensions_is_whole_there() -> None:
    tally = Tally(Weights.pack({"w": wave(0, 4, 4, 3)}).layout)
    with pytest.raises(ValueError, match="'w' has shape"):
        tally.mean({"w": np.zeros((4, 4, 1), np.float32)}, 1.0)
