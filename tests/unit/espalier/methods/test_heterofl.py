"""HeteroFL against its formula and the authors' code."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from bench.local_tree import LocalClient, LocalTree
from torch import nn

from espalier.data.spec import open_data
from espalier.models.architecture import build_with
from tests.support.by_hand import (
    EDGES,
    Arrays,
    aggregate,
    method,
    reply,
    run_tree,
    same,
    server,
    wave,
)

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


def test_static_statistics_equal_one_pass_over_all_batches(tmp_path: Path) -> None:
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
