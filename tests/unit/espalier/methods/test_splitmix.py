"""Split-Mix: base networks and their assignment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from espalier.methods.planning import Member
from espalier.methods.run_config import RunConfig
from espalier.methods.splitmix import BaseLosses
from espalier.models.initial import initial_bases
from espalier.tasks.classification import CrossEntropy
from tests.support.by_hand import EDGES, Arrays, aggregate, method, reply, same, server, wave
from tests.support.terms import gradients


def test_base_networks_are_trained_on_their_own() -> None:
    model = initial_bases(RunConfig(model="cnn", seed=1), (1, 8, 8), 10, 0.5, [3, 5])
    both = gradients(BaseLosses(), model)
    assert {name.partition(".")[0] for name in both} == {"base3", "base5"}
    for number in (3, 5):
        alone = gradients(CrossEntropy(), model.get_submodule(f"base{number}"))
        for name, gradient in alone.items():
            assert torch.allclose(both[f"base{number}.{name}"], gradient, atol=1e-7)
            assert gradient.abs().sum() > 0


@EDGES
def test_split_mix_averages_bases_as_the_authors_code(edges: int) -> None:
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
