from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from espalier.models import architecture
from espalier.models.architecture import build, build_with, describe, is_reduced
from espalier.models.pruning import prune
from espalier.models.unet import unet
from espalier.models.unet_family import UNetArguments
from espalier_proto import espalier_pb2 as pb
from tests.support.networks import over_the_wire


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(1)
    return cast(nn.Module, unet("unet-tiny", 1, 8).eval())


@pytest.fixture(scope="module")
def pruned(dense: nn.Module) -> nn.Module:
    return prune(dense, 0.3).eval()


@pytest.fixture(scope="module")
def spec(dense: nn.Module) -> bytes:
    return describe(dense).SerializeToString()


@pytest.mark.parametrize("which", ["dense", "pruned"])
def test_a_rebuilt_network_computes_the_same(which: str, request: pytest.FixtureRequest) -> None:
    model: nn.Module = request.getfixturevalue(which)
    rebuilt = build_with(over_the_wire(model), model.state_dict()).eval()
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(rebuilt(images, 17).sample, model(images, 17).sample)
    assert list(rebuilt.state_dict()) == list(model.state_dict())
    assert describe(rebuilt) == describe(model)


def test_a_rebuilt_network_copies_received_tensors(pruned: nn.Module) -> None:
    received = {name: t.clone() for name, t in pruned.state_dict().items()}
    kept = {name: t.clone() for name, t in received.items()}
    model = build_with(over_the_wire(pruned), received)
    assert all(p.requires_grad for p in model.parameters())
    model(torch.zeros(1, 1, 8, 8), 5).sample.square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(torch.equal(received[name], kept[name]) for name in kept)
    assert not torch.equal(model.state_dict()["conv_in.bias"], kept["conv_in.bias"])


def test_a_built_network_takes_no_memory(dense: nn.Module) -> None:
    assert {t.device.type for t in build(over_the_wire(dense)).state_dict().values()} == {"meta"}


def test_only_a_pruned_network_counts_as_reduced(dense: nn.Module, pruned: nn.Module) -> None:
    assert not is_reduced(dense)
    assert is_reduced(pruned)
    assert is_reduced(build_with(over_the_wire(pruned), pruned.state_dict()))


def test_half_precision_survives(dense: nn.Module) -> None:
    half = build_with(over_the_wire(dense), dense.state_dict()).bfloat16()
    assert {t.dtype for t in build_with(over_the_wire(half), half.state_dict()).parameters()} == {
        torch.bfloat16
    }


def test_every_constructor_argument_is_known() -> None:
    from diffusers import UNet2DModel

    assert set(UNetArguments.model_fields) == set(inspect.signature(UNet2DModel.__init__).parameters) - {
        "self"
    }


def tensor(spec: pb.ArchitectureSpec, name: str) -> pb.TensorSpec:
    return next(t for t in spec.tensors if t.name == name)


def set_shape(name: str, *shape: int) -> Callable[[pb.ArchitectureSpec], None]:
    def spoil(spec: pb.ArchitectureSpec) -> None:
        tensor(spec, name).shape[:] = shape

    return spoil


def set_config(**values: Any) -> Callable[[pb.ArchitectureSpec], None]:
    return lambda spec: spec.config.update(values)


def drop_groups(spec: pb.ArchitectureSpec) -> None:
    del spec.groups["conv_norm_out"]


NONSENSE: dict[str, tuple[Callable[[pb.ArchitectureSpec], object], str]] = {
    "family": (lambda s: setattr(s, "family", "gan"), "'gan' is unknown; known are unet, mlp"),
    "no tensors": (lambda s: s.ClearField("tensors"), "0 tensors"),
    "missing": (lambda s: s.tensors.pop(0), "'conv_in.weight' is not described"),
    "extra": (
        lambda s: s.tensors.add(name="backdoor.weight", dtype="float32", shape=[1]),
        "'backdoor.weight' is not part",
    ),
    "twice": (lambda s: s.tensors.append(s.tensors[0]), "described twice"),
    "dtype": (lambda s: setattr(s.tensors[0], "dtype", "object"), "the dtype 'object'"),
    "huge": (set_shape("conv_in.weight", 10**5, 10**5, 3, 3), "more than 1,000,000,000 parameters"),
    "empty": (set_shape("conv_in.weight", 0, 1, 3, 3), r"'conv_in.weight' has the shape \[0, 1, 3, 3\]"),
    "dimensions": (set_shape("conv_in.weight", 40, 9), "'conv_in.weight' .* expected 4 dimensions"),
    "kernel": (set_shape("conv_in.weight", 40, 1, 5, 5), "'conv_in.weight' has a kernel of"),
    "bias": (set_shape("conv_in.bias", 39), "'conv_in.bias' has 39 elements, its weight has 40"),
    "groups": (
        lambda s: s.groups.update({"conv_norm_out": 7}),
        "'conv_norm_out' has 40 channels, not a multiple of 7",
    ),
    "no groups": (drop_groups, "'conv_norm_out' has no groups"),
    "alien groups": (lambda s: s.groups.update({"x": 1}), "'x' is not part"),
    "heads": (lambda s: s.heads.update({"mid_block.attentions.0": 3}), "80 wide, not a multiple of 3"),
    "no heads": (lambda s: s.heads.clear(), "has no heads"),
    "unknown argument": (set_config(weights_url="http://x"), "'weights_url'"),
    "argument type": (set_config(layers_per_block="2"), "'layers_per_block'"),
    "argument range": (set_config(layers_per_block=10**6), "'layers_per_block'"),
    "block": (set_config(down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"]), "'down_block_types.1'"),
    "levels": (set_config(block_out_channels=[40]), "differ in number"),
    "time": (set_shape("time_embedding.linear_1.weight", 160, 41), "time_embedding.linear_1"),
}


@pytest.mark.parametrize("case", list(NONSENSE))
def test_nonsense_is_refused_with_its_place(case: str, spec: bytes) -> None:
    spoil, message = NONSENSE[case]
    wrong = pb.ArchitectureSpec.FromString(spec)
    spoil(wrong)
    with pytest.raises(ValueError, match=message):
        build(wrong)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_single_changed_dimension_never_passes(data: st.DataObject, spec: bytes) -> None:
    wrong = pb.ArchitectureSpec.FromString(spec)
    chosen = wrong.tensors[data.draw(st.integers(0, len(wrong.tensors) - 1))]
    axis = data.draw(st.integers(0, len(chosen.shape) - 1))
    # Doubling keeps groups and heads dividing, so that only the fit of the layers can give it away.
    chosen.shape[axis] *= 2
    with pytest.raises(ValueError, match=r"tensor|do not match|GroupNorm|attention|turns"):
        build(wrong)


def test_tensors_that_are_not_the_described_ones_are_refused(dense: nn.Module) -> None:
    spec = describe(dense)
    own = dict(dense.state_dict())
    with pytest.raises(ValueError, match=r"'conv_in\.bias' is missing"):
        build_with(spec, {k: v for k, v in own.items() if k != "conv_in.bias"})
    with pytest.raises(ValueError, match="'more' is not part"):
        build_with(spec, own | {"more": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"'conv_in.bias' is float32\[39\], the architecture says float32\[40\]"
    ):
        build_with(spec, own | {"conv_in.bias": torch.zeros(39)})
    with pytest.raises(ValueError, match=r"float16\[40\]"):
        build_with(spec, own | {"conv_in.bias": torch.zeros(40, dtype=torch.float16)})


def test_a_network_of_no_family_is_not_described() -> None:
    with pytest.raises(TypeError, match="no family describes a Linear"):
        describe(nn.Linear(1, 1))


def test_layers_are_verified_once_and_a_mismatch_is_found_every_time(
    dense: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[nn.Module] = []
    family = architecture.FAMILIES["unet"]

    def counted(model: nn.Module) -> None:
        verified.append(model)
        family.verify(model)

    watched = {**architecture.FAMILIES, "unet": dataclasses.replace(family, verify=counted)}
    monkeypatch.setattr(architecture, "FAMILIES", watched)
    monkeypatch.setattr(architecture, "_verified", {})
    fitting = describe(dense)
    for _ in range(3):
        build(fitting)
    assert len(verified) == 1
    mismatch = over_the_wire(dense)
    NONSENSE["time"][0](mismatch)
    for _ in range(2):
        with pytest.raises(ValueError, match="do not match"):
            build(mismatch)
    assert len(verified) == 3
