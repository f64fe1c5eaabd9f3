"""FjORD: ordered dropout, and averages of nested blocks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator
from torch.nn import functional

from espalier.methods.fjord import OrderedDropout, statistics
from espalier.methods.state import CloudState
from espalier.training.objectives import TrainingError
from espalier.wire.sections import MODEL, SectionId
from espalier_client.trainer import train_local
from tests.support.by_hand import (
    EDGES,
    Nested,
    aggregate,
    corner,
    method,
    reply_of,
    same,
    server,
    wave,
)
from tests.support.terms import Images, batch, gradients, local_round, network, received, result

WIDTHS = (0.25, 0.5, 1.0)
MEAN = "norm.running_mean"
Key = tuple[SectionId, str]


def fjord_shapes(width: float) -> dict[Key, tuple[int, ...]]:
    """Return the shapes of the tensors that a client of a width holds."""
    w = int(4 * width)
    shapes: dict[Key, tuple[int, ...]] = {
        (MODEL, "hidden.weight"): (w, 2),
        (MODEL, "hidden.bias"): (w,),
        (MODEL, "classifier.weight"): (3, w),
    }
    return shapes | {(statistics(p), MEAN): (int(4 * p),) for p in WIDTHS if p <= width}


FJORD = fjord_shapes(1)


def nested(arrays: Mapping[Key, np.ndarray]) -> Nested:
    found: Nested = {}
    for (section, name), array in arrays.items():
        found.setdefault(section, {})[name] = array
    return found


def fjord_server(arrays: Mapping[Key, np.ndarray]) -> CloudState:
    sections = nested(arrays)
    state = server(sections.pop(MODEL))
    state.put(sections)
    return state


def by_key(state: CloudState) -> dict[Key, np.ndarray]:
    return {(s, n): a for s, arrays in state.payload.views().items() for n, a in arrays.items()}


def blocks_overwritten(
    before: Mapping[Key, np.ndarray], clients: list[tuple[dict[Key, np.ndarray], float, int]]
) -> dict[Key, np.ndarray]:
    """Overwrite each block by its holders' mean, from the largest width down, as the paper's authors do."""
    after = {key: array.astype(np.float64) for key, array in before.items()}
    for p in (1.0, 0.5, 0.25):
        holders = [(own, n) for own, width, n in clients if width >= p]
        total = sum(n for _, n in holders)
        if not holders:
            continue
        for key in after:
            shape = fjord_shapes(p).get(key)
            if shape is None or key[0] not in (MODEL, statistics(p)):
                continue
            block = sum(n * corner(own[key], shape).astype(np.float64) for own, n in holders) / total
            after[key][tuple(slice(0, d) for d in shape)] = block
    return after


@EDGES
def test_fjord_overwrites_nested_blocks_by_their_holders_means(edges: int) -> None:
    rng = np.random.default_rng(2)
    state = fjord_server({n: rng.normal(size=s).astype(np.float32) for n, s in FJORD.items()})
    rule = method("fjord", model="mlp")
    for widths in ([0.25, 0.5, 1.0, 0.5], [0.5, 0.25, 0.5], [0.25, 0.25]):
        clients = [
            ({n: rng.normal(size=s).astype(np.float32) for n, s in fjord_shapes(w).items()}, w, 10 + 7 * k)
            for k, w in enumerate(widths)
        ]
        before = {key: a.copy() for key, a in by_key(state).items()}
        assert before.keys() == FJORD.keys()
        replies = [reply_of(state, f"c{k}", nested(own), samples=n) for k, (own, _, n) in enumerate(clients)]
        aggregate(rule, state, replies, edges)
        for section, expected in nested(blocks_overwritten(before, clients)).items():
            same(state.section(section), expected)


def test_fjord_gives_the_numbers_of_its_authors_baseline() -> None:
    """Numbers of `aggregate`, run on the same tensors; nobody holds the width 1.

    adap/flower@fdef7afb1dca3030553be302366cfd285ed6632c, baselines/fjord/fjord/strategy.py; p_max 0.5 with
    30 samples, 0.25 with 10 and 50. That code ships whole tensors of which only the held blocks count.
    """
    state = fjord_server({n: wave(i, *s) for i, (n, s) in enumerate(FJORD.items())})
    replies = []
    for k, (width, samples) in enumerate(((0.5, 30), (0.25, 10), (0.25, 50))):
        whole = {n: wave(10 + 10 * k + i, *s) for i, (n, s) in enumerate(FJORD.items())}
        own = {n: corner(whole[n], s) for n, s in fjord_shapes(width).items()}
        replies.append(reply_of(state, f"c{k}", nested(own), samples=samples))
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
    }
    means = {
        0.25: [-0.2323966667883926],
        0.5: [-0.66923987865448, -0.9945526123046875],
        1.0: [0.7965654730796814, -0.9631309509277344, 0.36796051263809204, 0.5182282328605652],
    }
    same(state.tensors, {n: np.array(a) for n, a in expected.items()})
    for width, mean in means.items():
        same(state.section(statistics(width)), {MEAN: np.array(mean)})


LEVELS = "1,0.5,0.2"


def begun(preset: str, model: Any = None, **known: Any) -> tuple[OrderedDropout, Any]:
    model = network(preset) if model is None else model
    objective = OrderedDropout()
    objective.begin(model, local_round(model, preset, levels=LEVELS, **known))
    return objective, model


def narrow(preset: str, rate: float) -> Any:
    """Return a fresh narrow network, its widths worked out here."""
    whole = network(preset).arguments
    widths = {"widths": [math.ceil(rate * w) for w in whole.widths], "hidden": math.ceil(rate * whole.hidden)}
    return type(network(preset))(whole.model_copy(update=widths))


def sliced(model: Any, like: Any) -> Any:
    """Give a narrow network the leading slices of a model's parameters."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in like.named_parameters():
            parameter.copy_(own[name][tuple(slice(0, n) for n in parameter.shape)])
    return like


def drawn(objective: OrderedDropout, seed: int) -> float:
    """Return the width that a generator of this seed draws."""
    return objective._draw(torch.device("cpu"), Generator().manual_seed(seed)).width


def test_widths_are_drawn_evenly_up_to_the_clients_own() -> None:
    for model, widths in ((None, {1.0, 0.5, 0.2}), (narrow("cnn-bn", 0.5), {0.5, 0.2})):
        objective, _ = begun("cnn-bn", model)
        counts = Counter(drawn(objective, seed) for seed in range(600))
        assert set(counts) == widths
        expected = 600 / len(widths)
        assert all(abs(count - expected) < 4 * math.sqrt(expected) for count in counts.values())


@pytest.mark.parametrize("preset", ["cnn", "cnn-bn"])
def test_a_batch_touches_the_drawn_block_alone(preset: str) -> None:
    """Loss and gradient are those of a narrow network that holds the slice, and zero beyond it."""
    objective, model = begun(preset, distillation=False)
    seeds = {drawn(objective, seed): seed for seed in range(20)}
    assert set(seeds) == {1.0, 0.5, 0.2}
    images, labels = batch()
    for width, seed in seeds.items():
        small = sliced(model, narrow(preset, width))
        loss = functional.cross_entropy(small(images), labels)
        torch.autograd.backward(loss)
        value = objective.loss(model, images, labels, Generator().manual_seed(seed))
        assert value.item() == pytest.approx(loss.item(), rel=1e-5)
        theirs = {name: p.grad for name, p in small.named_parameters()}
        for name, gradient in gradients(objective, model, seed).items():
            expected = torch.zeros_like(gradient)
            block = theirs[name]
            assert block is not None
            expected[tuple(slice(0, n) for n in block.shape)] = block
            assert torch.allclose(gradient, expected, atol=1e-6), (width, name)
            outside = gradient.clone()
            outside[tuple(slice(0, n) for n in block.shape)] = 0
            assert outside.count_nonzero() == 0


def test_training_changes_only_the_drawn_widths() -> None:
    objective = OrderedDropout()
    model = network("cnn")
    local = local_round(model, levels="1,0.25", distillation=False, local_steps=1)
    objective.begin(model, local)
    # Find a client whose only batch draws the narrow width.
    seed = next(s for s in range(50) if drawn(objective, s) == 0.25)
    train_local(model, objective, Images(6), local, seed=seed, device="cpu")
    change = {name: tensor - local.received[name] for name, tensor in model.state_dict().items()}
    assert change["conv2.weight"][:8, :4].count_nonzero() > 0
    assert change["conv2.weight"][8:].count_nonzero() == 0
    assert change["conv2.weight"][:, 4:].count_nonzero() == 0
    # Classes stay whole: every row of the output layer, from the first quarter of the hidden units.
    assert (change["classifier.weight"][:, :16].abs().sum(1) > 0).all()
    assert change["classifier.weight"][:, 16:].count_nonzero() == 0


def test_small_widths_are_taught_by_the_largest() -> None:
    objective, model = begun("cnn")
    images, labels = batch()
    seeds = {drawn(objective, seed): seed for seed in range(20)}
    for width, seed in seeds.items():
        small = sliced(model, narrow("cnn", width))
        z, teacher = small(images), model(images)
        # By the paper: cross-entropy at p_max, KL against its constant softmax at p.
        p = teacher.detach().softmax(1)
        taught = (p * (p.log() - z.log_softmax(1))).sum(1).mean()
        total = functional.cross_entropy(teacher, labels) + taught
        assert objective.loss(model, images, labels, Generator().manual_seed(seed)).item() == pytest.approx(
            total.item(), rel=1e-5
        )
        model.zero_grad()
        torch.autograd.backward(total)
        expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        for name, parameter in small.named_parameters():
            expected[name][tuple(slice(0, n) for n in parameter.shape)] += parameter.grad
        for name, gradient in gradients(objective, model, seed).items():
            assert torch.allclose(gradient, expected[name], atol=1e-6), (width, name)


def test_every_width_has_running_statistics_of_its_own() -> None:
    objective, model = begun("cnn-bn", distillation=False)
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    images, labels = batch()
    seed = next(s for s in range(50) if drawn(objective, s) == 0.5)
    objective.loss(model, images, labels, Generator().manual_seed(seed))
    small = sliced(model, narrow("cnn-bn", 0.5))
    small(images)
    extra = objective.extra()
    assert list(extra) == [statistics(0.2), statistics(0.5), statistics(1)]
    for name, tensor in small.named_buffers():
        assert np.allclose(extra[statistics(0.5)][name], tensor.numpy(), atol=1e-6), name
    for name, tensor in model.named_buffers():
        assert torch.equal(tensor, before[name]), "the network's own statistics moved"
        assert np.array_equal(extra[statistics(1)][name], tensor.numpy())
    assert extra[statistics(0.5)]["norm1.num_batches_tracked"] == 1
    assert extra[statistics(0.2)]["norm1.num_batches_tracked"] == 0
    assert extra[statistics(0.2)]["norm1.running_mean"].shape == (math.ceil(0.2 * 16),)


def test_received_statistics_go_on() -> None:
    given = {statistics(0.2): {"norm1.running_mean": np.arange(4, dtype=np.float32)}}
    objective, _ = begun("cnn-bn", sections=given)
    assert objective.extra()[statistics(0.2)]["norm1.running_mean"].tolist() == [0.0, 1.0, 2.0, 3.0]
    with pytest.raises(TrainingError, match=r"norm1.running_mean.* are \[3\]"):
        begun("cnn-bn", sections={statistics(0.2): {"norm1.running_mean": np.zeros(3, np.float32)}})


def test_without_normalisation_nothing_further_is_sent() -> None:
    objective, _ = begun("cnn")
    assert objective.extra() == {}


def test_in_evaluation_the_clients_whole_network_is_measured() -> None:
    objective, model = begun("cnn")
    images, labels = batch()
    with torch.no_grad():
        expected = functional.cross_entropy(model(images), labels).item()
        values = [
            objective.loss(model.eval(), images, labels, Generator().manual_seed(s)).item() for s in range(9)
        ]
    assert values == pytest.approx([expected] * 9, rel=1e-5)


def test_a_narrow_clients_widths_are_shares_of_the_whole_network() -> None:
    """0.2 of 16 channels is 4; of the 8 that a client of 0.5 holds, 0.4 would be 4 too, but 0.2 of 64 is 13."""
    model = narrow("cnn-bn", 0.5)
    objective, _ = begun("cnn-bn", model)
    shapes = {(s.member, n): a.shape for s, arrays in objective.extra().items() for n, a in arrays.items()}
    assert shapes["0.2", "norm3.running_mean"] == (13,)
    assert shapes["0.5", "norm3.running_mean"] == (32,)
    assert ("1", "norm3.running_mean") not in shapes


def test_networks_that_do_not_come_in_the_widths_are_refused() -> None:
    with pytest.raises(TrainingError, match="none of the widths"):
        begun("cnn-bn", narrow("cnn-bn", 0.7))
    with pytest.raises(TrainingError, match="none of the widths"):
        begun("cnn-bn", narrow("cnn-bn", 0.1))


def test_a_network_with_exits_is_narrowed_and_taught_at_each() -> None:
    model = network("depth-cnn")
    objective = OrderedDropout()
    objective.begin(model, local_round(model, "depth-cnn", levels="1,0.5"))
    images, labels = batch()
    taught = {
        drawn(objective, s): objective.loss(model, images, labels, Generator().manual_seed(s)).item()
        for s in range(6)
    }
    plain = sum(functional.cross_entropy(z, labels).item() for z in model(images))
    assert taught[1.0] == pytest.approx(plain, rel=1e-5)
    assert taught[0.5] > plain + 1e-6
    assert objective.end(model, result(), received(model)) == {}
