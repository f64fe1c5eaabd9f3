"""Our attention over pixels is diffusers' function, whatever a head's width, in every network that is built."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from espalier.diffusers_shim import import_diffusers
from espalier.models import unet_family
from espalier.models.architecture import build, describe
from espalier.models.attention import PixelAttention, attend_as_diffusers
from espalier.models.pruning import prune
from espalier.models.unet import PRESETS, unet

import_diffusers()
from diffusers.models.attention_processor import Attention  # noqa: E402  (the shim must come first)


def layer(heads: int, width: int, channels: int = 24) -> Any:
    torch.manual_seed(0)
    made = Attention(
        channels,
        heads=heads,
        dim_head=width,
        norm_num_groups=4,
        bias=True,
        residual_connection=True,
        rescale_output_factor=1,
    )
    nn.init.normal_(made.group_norm.weight)
    nn.init.normal_(made.group_norm.bias)
    return made


@pytest.mark.parametrize("width", [1, 6, 8, 12, 16, 20])
@pytest.mark.parametrize("rescaled", [1, 2.0])
def test_it_is_the_textbook_formula(width: int, rescaled: float) -> None:
    """softmax(q k^T / sqrt(d)) v per head and pixel, one head at a time, projected and added to the images."""
    attention = layer(3, width)
    attention.rescale_output_factor = rescaled
    images = torch.randn(2, 24, 3, 5)
    normed = nn.functional.group_norm(images, 4, attention.group_norm.weight, attention.group_norm.bias)
    rows = normed.flatten(2).transpose(1, 2).double()
    parts = []
    for head in range(3):
        at = slice(head * width, (head + 1) * width)
        query, key, value = (
            rows @ p.weight.double()[at].T + p.bias.double()[at]
            for p in (attention.to_q, attention.to_k, attention.to_v)
        )
        scores = torch.exp(query @ key.transpose(1, 2) / width**0.5)
        parts.append(scores / scores.sum(-1, keepdim=True) @ value)
    out = attention.to_out[0]
    projected = torch.cat(parts, -1) @ out.weight.double().T + out.bias.double()
    expected = (projected.transpose(1, 2).reshape(images.shape) + images) / rescaled
    attention.set_processor(PixelAttention())
    found = attention(images, temb=torch.zeros(2, 8))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous()


def gradients(model: Any, images: Tensor) -> list[Tensor]:
    model.eval()
    model.zero_grad(set_to_none=True)
    steps = torch.tensor([3, 700])
    model(images, steps, return_dict=False)[0].square().mean().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("ratio", [0, 0.2])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_gradients_equal_those_of_diffusers_attention(preset: str, ratio: float) -> None:
    torch.manual_seed(1)
    size = 16 if preset == "unet-paper" else 8
    model: Any = unet(preset, 1, size)
    if ratio:
        model = prune(model, ratio)
    other = copy.deepcopy(model)
    attend_as_diffusers(other)
    images = torch.randn(2, 1, size, size)
    for own, theirs in zip(gradients(model, images), gradients(other, images), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "further",
    [
        {"resnet_time_scale_shift": "scale_shift"},
        {"attn_norm_num_groups": 4},
        {"mid_block_scale_factor": 2.0},
        {"add_attention": False},
        {"mid_block_type": None},
    ],
)
def test_so_has_every_network_that_a_description_may_hold(further: dict[str, Any]) -> None:
    """A middle block with scale_shift has an attention without a norm."""
    torch.manual_seed(2)
    arguments = unet_family.config(unet("unet-tiny", 1, 8)) | further
    model = unet_family.construct(arguments)
    other = copy.deepcopy(model)
    attend_as_diffusers(other)
    images = torch.randn(2, 1, 8, 8)
    for own, theirs in zip(gradients(model, images), gradients(other, images), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-6)
    assert processors(build(describe(model))) <= {PixelAttention}


def processors(model: nn.Module) -> set[type]:
    return {type(m.processor) for m in model.modules() if isinstance(m, Attention)}


def test_it_is_in_every_network_that_is_built_received_or_pruned() -> None:
    dense = unet("unet-tiny", 1, 8)
    pruned = prune(dense, 0.2)
    for model in (dense, pruned, build(describe(dense)), build(describe(pruned)), copy.deepcopy(pruned)):
        assert processors(model) == {PixelAttention}


def test_channels_are_cut_again_under_autocast() -> None:
    attention = layer(4, 6)
    attention.set_processor(PixelAttention())
    images = torch.randn(1, 24, 4, 4)
    exact = attention(images)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = attention(images)
    torch.testing.assert_close(coarse.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("what", ["encoder_hidden_states", "attention_mask"])
def test_what_no_network_here_attends_to_is_refused(what: str) -> None:
    attention = layer(2, 8)
    attention.set_processor(PixelAttention())
    with pytest.raises(ValueError, match="only to the pixels of its own image"):
        attention(torch.randn(1, 24, 2, 2), **{what: torch.randn(1, 4, 24)})
