"""Kept networks: as good as new, whatever was done with them before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from espalier.methods.run_config import RunConfig
from espalier.models import model_cache
from espalier.models.architecture import build_with, describe, is_reduced
from espalier.models.initial import initial_model
from espalier.models.model_cache import acquire, release
from espalier.models.pruning import prune
from espalier_proto import espalier_pb2 as pb


@pytest.fixture(autouse=True)
def none_kept() -> Iterator[None]:
    model_cache._idle.clear()
    yield
    model_cache._idle.clear()


def network(seed: int = 1, size: int = 8) -> nn.Module:
    return initial_model(RunConfig.from_flat({"model": "unet-tiny", "seed": seed}), (1, size, size), 10)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Take three steps of Adam on noise, and return the tensors."""
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        image = torch.randn(4, 1, 8, 8, generator=generator)
        model(image, torch.arange(4), return_dict=False)[0].square().mean().backward()
        optimizer.step()
    return tensors_of(model)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def test_kept_layers_train_as_new_ones_do() -> None:
    spec, start = describe(network()), tensors_of(network())
    pruned = prune(network(2), 0.2)
    other, other_start = describe(pruned), tensors_of(pruned)
    wanted = trained(build_with(spec, start))
    first = acquire(spec, start)
    assert equal(trained(first), wanted)
    release(first)
    between = acquire(other, other_start)
    assert between is not first
    trained(between)
    release(between)
    again = acquire(spec, start)
    assert again is first
    assert equal(trained(again), wanted)
    assert is_reduced(between)
    assert not is_reduced(again)


def test_nothing_of_a_training_is_left() -> None:
    spec, start = describe(network()), tensors_of(network())
    model = acquire(spec, start)
    held = dict(model.named_parameters())
    trained(model)
    model.eval().requires_grad_(False).double()
    after = {name: tensor.detach().clone() for name, tensor in held.items()}
    release(model)
    assert all(p.is_meta for p in model.parameters())
    again = acquire(spec, start)
    assert again is model
    assert all(module.training for module in again.modules())
    assert all(p.requires_grad and p.grad is None and p.dtype == torch.float32 for p in again.parameters())
    assert equal(tensors_of(again), start)
    trained(again)
    assert all(torch.equal(held[name], tensor) for name, tensor in after.items())  # views of a reply stay


def test_what_is_trained_is_a_copy() -> None:
    spec, start = describe(network()), tensors_of(network())
    before = {name: tensor.clone() for name, tensor in start.items()}
    for _ in range(2):
        model = acquire(spec, start)
        trained(model)
        release(model)
    assert equal(start, before)


def test_two_at_a_time_share_nothing() -> None:
    spec, start = describe(network()), tensors_of(network())
    release(acquire(spec, start))
    one, two = acquire(spec, start), acquire(spec, start)
    assert one is not two
    assert not set(map(id, one.modules())) & set(map(id, two.modules()))
    release(one)
    release(one)
    assert acquire(spec, start) is one
    assert acquire(spec, start) not in (one, two)


def with_hook(model: nn.Module) -> None:
    next(iter(model.children())).register_forward_hook(lambda *_: None)


def with_another_layer(model: nn.Module) -> None:
    model.conv_out = nn.Conv2d(40, 1, 3, padding=1)


def with_one_more(model: nn.Module) -> None:
    model.head = nn.Linear(2, 2)


def with_a_buffer(model: nn.Module) -> None:
    model.register_buffer("count", torch.zeros(()))


@pytest.mark.parametrize("change", [with_hook, with_another_layer, with_one_more, with_a_buffer])
def test_a_changed_network_is_not_kept(change: object) -> None:
    spec, start = describe(network()), tensors_of(network())
    model = acquire(spec, start)
    assert callable(change)
    change(model)
    release(model)
    assert acquire(spec, start) is not model


def test_a_network_that_was_not_lent_is_not_kept() -> None:
    model = network()
    release(model)
    assert acquire(describe(model), tensors_of(model)) is not model


def test_only_the_newest_are_kept() -> None:
    shells = []
    for size in (8, 16, 24, 32, 40):
        model = network(size=size)
        spec = describe(model)
        shells.append((spec, tensors_of(model), acquired := acquire(spec, tensors_of(model))))
        release(acquired)
    assert len(model_cache._idle) == model_cache.MOST
    assert acquire(*shells[0][:2]) is not shells[0][2]
    assert acquire(*shells[4][:2]) is shells[4][2]


@pytest.mark.parametrize("kind", ["missing", "extra", "shape", "dtype"])
def test_kept_layers_take_no_tensors_that_do_not_fit(kind: str) -> None:
    spec, start = describe(network()), tensors_of(network())
    release(acquire(spec, start))
    name = next(iter(start))
    wrong = dict(start)
    if kind == "missing":
        del wrong[name]
    elif kind == "extra":
        wrong["more"] = torch.zeros(1)
    else:
        wrong[name] = start[name][:1] if kind == "shape" else start[name].double()
    with pytest.raises(ValueError, match="more" if kind == "extra" else name):
        acquire(spec, wrong)
    assert equal(tensors_of(acquire(spec, start)), start)


def test_a_description_that_differs_gets_its_own() -> None:
    model = network()
    spec, start = describe(model), tensors_of(model)
    acquired = acquire(spec, start)
    release(acquired)
    other = pb.ArchitectureSpec()
    other.CopyFrom(spec)
    other.config["norm_eps"] = 0.5
    assert acquire(other, start) is not acquired
