from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from espalier.errors import ConfigError
from espalier.models.architecture import FAMILIES, arguments, build, build_with, describe
from espalier.models.variants import (
    depth_of,
    ensemble,
    narrow_width,
    narrowed,
    shortened,
    with_members,
    with_norm,
)
from espalier_proto import espalier_pb2 as pb

BASE: dict[str, Any] = {"in_channels": 2, "sample_size": 9, "classes": 4}
WHOLE: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [7, 5], "projection": 3},
    "cnn": {"widths": [5, 6], "hidden": 9, "norm": "batch"},
    "resnet": {"widths": [4, 6, 7], "blocks": 2, "norm": "batch", "projection": 5},
    "exits": {"widths": [3, 5, 8], "blocks": 1, "block": "residual", "depth": 3, "projection": 4},
}


def network(family: str, **more: Any) -> nn.Module:
    torch.manual_seed(3)
    return FAMILIES[family].construct(BASE | WHOLE[family] | more)


def shapes(spec: pb.ArchitectureSpec) -> dict[str, tuple[int, ...]]:
    return {t.name: tuple(t.shape) for t in spec.tensors}


def cut(whole: nn.Module, spec: pb.ArchitectureSpec) -> dict[str, Tensor]:
    """Leading slices of a network's tensors, cut without the code under test."""
    state = whole.state_dict()
    return {name: state[name][tuple(slice(d) for d in shape)] for name, shape in shapes(spec).items()}


def test_widths_are_rounded_up() -> None:
    assert [narrow_width(10, r) for r in (1.0, 0.5, 0.25, 0.05, 0.01)] == [10, 5, 3, 1, 1]
    # 0.55 * 100 is 55.000000000000007 in floating point, and 55 in truth.
    assert narrow_width(100, 0.55) == 55


def test_a_narrowed_networks_widths_by_hand() -> None:
    spec = narrowed(describe(network("cnn")), 0.5)
    assert shapes(spec) == {
        "conv1.weight": (3, 2, 3, 3),
        "conv1.bias": (3,),
        "norm1.weight": (3,),
        "norm1.bias": (3,),
        "norm1.running_mean": (3,),
        "norm1.running_var": (3,),
        "norm1.num_batches_tracked": (),
        "conv2.weight": (3, 3, 3, 3),
        "conv2.bias": (3,),
        "norm2.weight": (3,),
        "norm2.bias": (3,),
        "norm2.running_mean": (3,),
        "norm2.running_var": (3,),
        "norm2.num_batches_tracked": (),
        # 9 px -> 4 -> 2: 3 channels of 2 x 2.
        "hidden.weight": (5, 12),
        "hidden.bias": (5,),
        "classifier.weight": (4, 5),
        "classifier.bias": (4,),
    }


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(sorted(WHOLE)),
    rate=st.floats(0.05, 1),
    norm=st.sampled_from(["none", "batch", "static"]),
    depth=st.integers(1, 3),
)
def test_a_sub_network_is_a_leading_slice_and_runs(family: str, rate: float, norm: str, depth: int) -> None:
    whole = network(family, **({} if family == "mlp" else {"norm": norm}))
    spec = describe(whole)
    variant = narrowed(spec, rate)
    if family == "exits":
        variant = shortened(variant, depth)
        assert depth_of(variant) == depth
    held = shapes(spec)
    for name, shape in shapes(variant).items():
        assert len(shape) == len(held[name])
        assert all(0 < d <= w for d, w in zip(shape, held[name], strict=True))
    part = build_with(pb.ArchitectureSpec.FromString(variant.SerializeToString()), cut(whole, variant))
    images = torch.rand(3, 2, 9, 9)
    out = part(images)
    assert len(out) == depth if isinstance(out, list) else out.shape == (3, 4)
    assert part.eval()(images).shape == (3, 4)
    assert describe(part) == variant


def test_every_hidden_width_is_the_rounded_up_share() -> None:
    """Per axis: an axis is whole (image channels, classes, kernels) or ceil(rate * width)."""
    spec = describe(network("resnet"))
    variant, whole = shapes(narrowed(spec, 0.4)), shapes(spec)
    assert list(variant) == list(whole)
    for name, shape in variant.items():
        fixed = {0} if name.startswith("classifier") else {1} if name == "conv1.weight" else set()
        for axis, (new, old) in enumerate(zip(shape, whole[name], strict=True)):
            expected = old if axis in fixed | {2, 3} else math.ceil(0.4 * old)
            assert new == expected, (name, axis)


def test_full_width_is_the_network_itself() -> None:
    spec = describe(network("resnet"))
    before = spec.SerializeToString(deterministic=True)
    assert narrowed(spec, 1.0) == spec
    narrowed(spec, 0.3, scaler=True)
    assert spec.SerializeToString(deterministic=True) == before


def test_the_scaler_comes_on_request() -> None:
    spec = describe(network("mlp"))
    assert arguments(narrowed(spec, 0.25))["scale"] == 1
    assert arguments(narrowed(spec, 0.25, scaler=True))["scale"] == 0.25
    assert arguments(narrowed(narrowed(spec, 0.5, scaler=True), 0.5, scaler=True))["scale"] == 0.25


def test_a_shallow_networks_tensors_are_the_deep_ones() -> None:
    whole = network("exits")
    spec = describe(whole)
    for depth in (1, 2, 3):
        part = shortened(spec, depth)
        prefixes = ["stem", *(f"{kind}{i}" for kind in ("stage", "exit") for i in range(1, depth + 1))]
        expected = {n: s for n, s in shapes(spec).items() if n.split(".")[0] in prefixes}
        assert shapes(part) == expected
        # The parts that a shallow network has compute what they compute in the deep one.
        model: Any = build_with(part, cut(whole, part)).eval()
        images = torch.rand(2, 2, 9, 9)
        for own, deep in zip(model.exits(images), whole.eval().exits(images), strict=False):  # type: ignore[operator]
            assert torch.equal(own, deep)


def test_dtypes_are_kept() -> None:
    spec = describe(network("exits").bfloat16())
    dtypes = {t.name: t.dtype for t in spec.tensors}
    variant = narrowed(shortened(spec, 2), 0.5)
    assert {t.dtype for t in variant.tensors} >= {"bfloat16", "int64"}
    assert all(t.dtype == dtypes[t.name] for t in variant.tensors)


def test_members_of_an_ensemble() -> None:
    spec = ensemble(describe(network("cnn")), 0.5, range(4))
    narrow = shapes(narrowed(describe(network("cnn")), 0.5))
    assert shapes(spec) == {f"base{i}.{n}": s for i in range(4) for n, s in narrow.items()}
    some = with_members(spec, [3, 1])
    assert shapes(some) == {f"base{i}.{n}": s for i in (3, 1) for n, s in narrow.items()}
    assert build(some).state_dict().keys() == shapes(some).keys()
    assert arguments(ensemble(describe(network("cnn")), 0.5, [0], scaler=True))["base"]["scale"] == 0.5
    for ids, message in (([4], "base network 4 is not among"), ([1, 1], "repeated"), ([], "members")):
        with pytest.raises(ValueError, match=message):
            with_members(spec, ids)


def test_static_normalisation_loses_the_running_statistics_only() -> None:
    whole = network("resnet")
    spec = describe(whole)
    static = with_norm(spec, "static")
    assert shapes(static) == {t.name: tuple(t.shape) for t in spec.tensors if not t.buffer}
    assert with_norm(static, "batch") == spec
    of_bases = ensemble(describe(network("cnn")), 0.5, [0, 2])
    assert not any(t.buffer for t in with_norm(of_bases, "static").tensors)
    plain = describe(network("mlp"))
    assert with_norm(plain, "static") == plain


def test_what_a_network_cannot_be_is_said() -> None:
    cnn, exits = describe(network("cnn")), describe(network("exits"))
    bases = ensemble(cnn, 0.5, [0])
    unet = pb.ArchitectureSpec(family="unet")
    cases: list[tuple[Any, str]] = [
        (lambda: narrowed(cnn, 0), "0 is not a share of a width"),
        (lambda: narrowed(cnn, 1.5), "1.5 is not a share"),
        (lambda: narrowed(unet, 0.5), "no sub-models of the family 'unet'"),
        (lambda: narrowed(bases, 0.5), "'bases' has a fixed width"),
        (lambda: shortened(cnn, 1), "'cnn' comes in one depth only; depth-cnn"),
        (lambda: shortened(exits, 4), "depth 4 of a network of 3 stages"),
        (lambda: shortened(exits, 0), "depth 0"),
        (lambda: ensemble(exits, 0.5, [0]), "mlp, cnn, resnet, not exits"),
        (lambda: with_members(cnn, [0]), "has no base networks"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            call()
