"""Aggregation of sub-models against loops over single numbers, and against the authors' code where it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bench.local_tree import LocalClient, LocalTree
from common.data.spec import open_data
from common.methods.planning import Member
from common.methods.tally import Tally
from common.models.architecture import build_with
from common.wire.payload import Weights
from tests.unit.by_hand import Arrays, aggregate, method, reply, run_tree, same, server, wave

EDGES = pytest.mark.parametrize("edges", [1, 2, 3])


def corner(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    return array[tuple(slice(0, n) for n in shape)]


# --- HeteroFL ----------------------------------------------------------------------------------------

HETERO = {"hidden.weight": (4, 3), "hidden.bias": (4,), "classifier.weight": (3, 4), "classifier.bias": (3,)}


def hetero_shapes(rate: float) -> dict[str, tuple[int, ...]]:
    width = math.ceil(4 * rate)
    return {
        "hidden.weight": (width, 3),
        "hidden.bias": (width,),
        "classifier.weight": (3, width),
        "classifier.bias": (3,),
    }


def one_by_one(before: Arrays, clients: list[tuple[Arrays, set[int]]]) -> Arrays:
    """HeteroFL's rule number by number: the plain mean over who holds it, rows of foreign labels not held."""
    after = {name: array.copy() for name, array in before.items()}
    for name, array in before.items():
        for at in np.ndindex(array.shape):
            held = [
                float(own[name][at])
                for own, labels in clients
                if all(i < n for i, n in zip(at, own[name].shape, strict=True))
                and (not name.startswith("classifier") or at[0] in labels)
            ]
            if held:
                after[name][at] = sum(held) / len(held)
    return after


@EDGES
def test_heterofl_is_the_mean_over_holders_number_by_number(edges: int) -> None:
    rng = np.random.default_rng(5)
    state = server({n: rng.normal(size=s).astype(np.float32) for n, s in HETERO.items()})
    rule = method("heterofl", model="mlp")
    for _ in range(3):
        # Label 2 is nobody's but the widest client's; in the second set of labels it is nobody's at all.
        clients = [
            ({n: rng.normal(size=s).astype(np.float32) for n, s in hetero_shapes(rate).items()}, labels)
            for rate, labels in ((1.0, {0, 2}), (0.5, {0}), (0.25, {0, 1}), (0.5, {1}))
        ][int(rng.integers(2)) :]
        before = {n: a.copy() for n, a in state.tensors.items()}
        replies = [
            reply(state, f"c{k}", own, samples=10 * k + 1, labels=[int(i in labels) for i in range(3)])
            for k, (own, labels) in enumerate(clients)
        ]
        aggregate(rule, state, replies, edges)
        same(state.tensors, one_by_one(before, clients), atol=1e-6)


def test_heterofl_gives_the_numbers_of_the_authors_code() -> None:
    """Numbers of `Federation.combine`, run on the same tensors.

    diaoenmao/HeteroFL-Computation-and-Communication-Efficient-Federated-Learning-for-Heterogeneous-Clients
    @cc40f3e46b0fab5364d62a1bb623d3764daf179d, src/fed.py; rates 1, 0.5, 0.25, labels {0,2}, {0}, {0,1}.
    """
    state = server({n: wave(i, *s) for i, (n, s) in enumerate(HETERO.items())})
    replies = []
    for k, (rate, labels) in enumerate(((1.0, (1, 0, 1)), (0.5, (1, 0, 0)), (0.25, (1, 1, 0)))):
        own = {n: wave(10 + 10 * k + i, *s) for i, (n, s) in enumerate(hetero_shapes(rate).items())}
        replies.append(reply(state, f"c{k}", own, samples=7 + k, labels=labels))
    aggregate(method("heterofl", model="mlp"), state, replies)
    expected = {
        "hidden.weight": [
            [-0.2312488, 0.10460087, -0.39010665],
            [-0.43549484, 0.9553263, -0.085537314],
            [-0.21399817, 0.910327, -0.8767737],
            [0.14024068, 0.7087346, -0.9894605],
        ],
        "hidden.bias": [-0.22263895, -0.0115587115, 0.6842899, -0.88642144],
        "classifier.weight": [
            [-0.18389595, -0.5803462, 0.9574299, 0.3805991],
            [-0.65391016, 0.3679605, 0.99647564, 0.51822823],
            [-0.63830715, -0.8283244, 0.47685665, 0.92126954],
        ],
        "classifier.bias": [-0.120263495, 0.027255395, 0.16717462],
    }
    same(state.tensors, {n: np.array(a) for n, a in expected.items()})


def test_without_the_masked_loss_every_row_counts() -> None:
    state = server({n: wave(i, *s) for i, (n, s) in enumerate(HETERO.items())})
    own = {n: wave(20 + i, *s) for i, (n, s) in enumerate(HETERO.items())}
    update = reply(state, "c", own, labels=(1, 0, 0))
    aggregate(method("heterofl", model="mlp", masked_loss=False), state, [update])
    same(state.tensors, own)


def test_static_statistics_of_a_tree_are_those_of_one_pass_over_all_batches(tmp_path: Path) -> None:
    """HeteroFL.deployed asks every client; torch's own cumulative average over their batches is the reference."""
    data = {f"c{i}": f"digits:{i}/40" for i in range(3)}
    tree = LocalTree(tmp_path, [LocalClient(n, d, (i % 2,)) for i, (n, d) in enumerate(data.items())])
    run = run_tree(tree, "heterofl", 3, model="cnn-bn", rounds=1, batch_size=16)
    assert run.state is not None
    assert run.assessment is not None
    whole, *narrow = run.assessment.networks()
    assert [n.label for n in (whole, *narrow)] == ["global", "level 0.5", "level 0.25"]
    views = whole.weights.views()
    trained = run.state.tensors
    reference = build_with(whole.architecture, {n: torch.from_numpy(a.copy()) for n, a in views.items()})
    reference.train()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    batches = 0
    with torch.no_grad():
        for spec in data.values():
            images = open_data(spec)
            for start in range(0, len(images), 16):
                reference(images.fetch(np.arange(start, min(start + 16, len(images)))))
                batches += 1
    expected = {n: t.numpy() for n, t in reference.state_dict().items()}
    statistics = [n for n in expected if "running" in n]
    assert statistics
    for name in statistics:
        np.testing.assert_allclose(views[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert {int(views[n]) for n in views if n.endswith("num_batches_tracked")} == {batches}
    assert all(np.array_equal(views[n], a) for n, a in trained.items())


# --- FjORD -------------------------------------------------------------------------------------------

FJORD = {
    "hidden.weight": (4, 2),
    "hidden.bias": (4,),
    "classifier.weight": (3, 4),
    "p0.25/norm.running_mean": (1,),
    "p0.5/norm.running_mean": (2,),
    "p1/norm.running_mean": (4,),
}


def fjord_shapes(width: float) -> dict[str, tuple[int, ...]]:
    w = int(4 * width)
    shapes: dict[str, tuple[int, ...]] = {
        "hidden.weight": (w, 2),
        "hidden.bias": (w,),
        "classifier.weight": (3, w),
    }
    return shapes | {f"p{p:g}/norm.running_mean": (int(4 * p),) for p in (0.25, 0.5, 1.0) if p <= width}


def blocks_overwritten(before: Arrays, clients: list[tuple[Arrays, float, int]]) -> Arrays:
    """Overwrite each block by its holders' mean, from the largest width down, as the paper's authors do."""
    after = {name: array.astype(np.float64) for name, array in before.items()}
    for p in (1.0, 0.5, 0.25):
        holders = [(own, n) for own, width, n in clients if width >= p]
        total = sum(n for _, n in holders)
        if not holders:
            continue
        for name in after:
            shape = fjord_shapes(p).get(name)
            if shape is None or ("/" in name and not name.startswith(f"p{p:g}/")):
                continue
            block = sum(n * corner(own[name], shape).astype(np.float64) for own, n in holders) / total
            after[name][tuple(slice(0, d) for d in shape)] = block
    return after


@EDGES
def test_fjord_overwrites_nested_blocks_by_their_holders_means(edges: int) -> None:
    rng = np.random.default_rng(2)
    state = server({n: rng.normal(size=s).astype(np.float32) for n, s in FJORD.items()})
    rule = method("fjord", model="mlp")
    for widths in ([0.25, 0.5, 1.0, 0.5], [0.5, 0.25, 0.5], [0.25, 0.25]):
        clients = [
            ({n: rng.normal(size=s).astype(np.float32) for n, s in fjord_shapes(w).items()}, w, 10 + 7 * k)
            for k, w in enumerate(widths)
        ]
        before = {n: a.copy() for n, a in state.tensors.items()}
        replies = [reply(state, f"c{k}", own, samples=n) for k, (own, _, n) in enumerate(clients)]
        aggregate(rule, state, replies, edges)
        same(state.tensors, blocks_overwritten(before, clients))


def test_fjord_gives_the_numbers_of_its_authors_baseline() -> None:
    """Numbers of `aggregate`, run on the same tensors; nobody holds the width 1.

    adap/flower@fdef7afb1dca3030553be302366cfd285ed6632c, baselines/fjord/fjord/strategy.py; p_max 0.5 with
    30 samples, 0.25 with 10 and 50. That code ships whole tensors of which only the held blocks count.
    """
    state = server({n: wave(i, *s) for i, (n, s) in enumerate(FJORD.items())})
    replies = []
    for k, (width, samples) in enumerate(((0.5, 30), (0.25, 10), (0.25, 50))):
        whole = {n: wave(10 + 10 * k + i, *s) for i, (n, s) in enumerate(FJORD.items())}
        own = {n: corner(whole[n], s) for n, s in fjord_shapes(width).items()}
        replies.append(reply(state, f"c{k}", own, samples=samples))
    aggregate(method("fjord", model="mlp"), state, replies)
    expected = {
        "hidden.weight": [
            [-0.6503667632738749, -0.11315947274367015],
            [-0.3488751947879791, -0.5413456559181213],
            [0.9612752199172974, 0.7965654730796814],
            [0.5240443348884583, 0.180596262216568],
        ],
        "hidden.bias": [-0.5834246277809143, 0.5182282328605652, 0.7965654730796814, 0.180596262216568],
        "classifier.weight": [
            [-0.437518705924352, -0.19398435950279236, -0.18729466199874878, -0.9631309509277344],
            [-0.947690467039744, -0.5527545809745789, 0.9964756369590759, 0.5182282328605652],
            [-0.07304624054167005, -0.8283243775367737, -0.3488751947879791, 0.6842898726463318],
        ],
        "p0.25/norm.running_mean": [-0.2323966667883926],
        "p0.5/norm.running_mean": [-0.66923987865448, -0.9945526123046875],
        "p1/norm.running_mean": [
            0.7965654730796814,
            -0.9631309509277344,
            0.36796051263809204,
            0.5182282328605652,
        ],
    }
    same(state.tensors, {n: np.array(a) for n, a in expected.items()})


# --- DepthFL -----------------------------------------------------------------------------------------

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


# --- Split-Mix ---------------------------------------------------------------------------------------


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


# --- the guard ---------------------------------------------------------------------------------------


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
