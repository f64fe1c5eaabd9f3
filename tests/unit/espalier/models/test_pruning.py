from __future__ import annotations

import subprocess
import sys
from math import floor
from typing import Any, cast

import pytest
import torch
from torch import nn

from espalier.errors import ConfigError
from espalier.models.pruning import prune
from espalier.models.unet import PRESETS, unet
from espalier.models.unet_family import heads
from espalier_server.evaluation.cost import macs_and_params


@pytest.fixture(scope="module")
def dense() -> Any:
    torch.manual_seed(1)
    return unet("unet-tiny", 1, 8)


@pytest.fixture(scope="module")
def paper() -> nn.Module:
    # Only shapes matter, and drawing 35 million random numbers takes seconds.
    with torch.device("meta"):
        empty = unet("unet-paper", 3, 32)
    model: nn.Module = empty.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    return model


# Ratio: parameters and multiply-accumulates of the paper's net at 32 pixels;
# `python -m bench.pruning` has the other ratios.
TABLE = {0.20: (20.340e6, 3.423e9), 0.40: (9.259e6, 1.533e9)}


@pytest.mark.parametrize("ratio", TABLE)
def test_the_papers_net_shrinks_as_tabled(ratio: float, paper: nn.Module) -> None:
    macs, parameters = macs_and_params(prune(paper, ratio))
    assert parameters == pytest.approx(TABLE[ratio][0], abs=600)
    assert macs == pytest.approx(TABLE[ratio][1], rel=2e-3)


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.4, 0.44, 0.6, 0.8])
def test_widths_shrink_by_whole_groups_and_heads_stay(ratio: float, dense: Any) -> None:
    preset = PRESETS["unet-tiny"]
    per_group = [w // preset.groups for w in preset.widths]
    first, deep = (preset.groups * floor(n * (1 - ratio) + 1e-6) for n in per_group)
    pruned = cast(Any, prune(dense, ratio))
    assert (pruned.conv_in.out_channels, pruned.conv_in.in_channels) == (first, 1)
    assert (pruned.conv_out.in_channels, pruned.conv_out.out_channels) == (first, 1)
    assert pruned.mid_block.resnets[0].conv1.out_channels == deep
    assert pruned.time_embedding.linear_1.out_features == floor(160 * (1 - ratio) + 1e-6)
    assert {m.num_groups for m in pruned.modules() if isinstance(m, nn.GroupNorm)} == {preset.groups}
    attention = pruned.mid_block.attentions[0]
    assert preset.head_dim is not None
    assert attention.heads == 80 // preset.head_dim
    assert attention.to_q.out_features == attention.heads * floor(preset.head_dim * (1 - ratio) + 1e-6)
    pruned(torch.zeros(2, 1, 8, 8), torch.tensor([1, 999])).sample.sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())


def test_the_small_preset_has_one_head_a_layer_and_its_sizes() -> None:
    """Attention costs by the head: heads of 8 took a third of a pruned network's step on a CPU."""
    dense = unet("unet-small", 1, 28)
    pruned = prune(dense, 0.2)
    # 0.8 of 96 and of 128 channels, rounded down.
    for model, widths, size in ((dense, {96, 128}, 5_312_481), (pruned, {76, 102}, 3_035_515)):
        layers = [cast(Any, model.get_submodule(path)) for path in heads(model)]
        assert {layer.heads for layer in layers} == {1}
        assert {layer.to_q.out_features for layer in layers} == widths
        assert macs_and_params(model)[1] == size


def test_the_weakest_channels_of_a_group_go(dense: Any) -> None:
    # conv1 of a residual block is a group of its own: 80 channels in 8 norm groups of 10, of which 2 go.
    block = dense.mid_block.resnets[0]
    weak = [3, 7]
    rows = torch.tensor([g * 10 + i for g in range(8) for i in weak])
    with torch.no_grad():
        for tensor in (block.conv1.weight, block.time_emb_proj.weight):
            tensor[rows] *= 0.01
        block.conv2.weight[:, rows] *= 0.01
    stay = torch.tensor([c for c in range(80) if c % 10 not in weak])
    pruned = cast(Any, prune(dense, 0.2)).mid_block.resnets[0]
    assert torch.equal(pruned.norm2.weight, block.norm2.weight[stay])
    assert torch.equal(pruned.conv1.bias, block.conv1.bias[stay])
    assert pruned.conv1.weight.shape == (64, 64, 3, 3)


def test_inner_channels_that_do_nothing_go_first_in_every_block() -> None:
    torch.manual_seed(3)
    model = cast(Any, unet("unet-tiny", 1, 8)).eval()
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "ResnetBlock2D":
                width = module.conv1.out_channels
                dead = torch.arange(width) % (width // 8) >= (width // 8) * 4 // 5
                module.conv1.weight[dead] = 0
                module.time_emb_proj.weight[dead] = 0
                module.conv2.weight[:, dead] = 0
    blocks = [m for m in cast(Any, prune(model, 0.2)).modules() if type(m).__name__ == "ResnetBlock2D"]
    assert {block.conv1.out_channels for block in blocks} == {32, 64}
    for block in blocks:
        assert block.conv1.weight.square().sum((1, 2, 3)).min() > 0
        assert block.conv2.weight.square().sum((0, 2, 3)).min() > 0


def test_the_given_model_stays_and_a_second_call_gives_the_same(dense: Any) -> None:
    before = {name: t.clone() for name, t in dense.state_dict().items()}
    first, other, second = prune(dense, 0.2), prune(unet("unet-tiny", 3, 16), 0.4), prune(dense, 0.2)
    assert all(torch.equal(t, before[name]) for name, t in dense.state_dict().items())
    assert all(torch.equal(t, second.state_dict()[name]) for name, t in first.state_dict().items())
    assert macs_and_params(other)[1] < macs_and_params(first)[1]


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5])
def test_a_ratio_outside_0_and_1_is_refused(ratio: float, dense: Any) -> None:
    with pytest.raises(ConfigError, match="pruning-ratio"):
        prune(dense, ratio)


def test_a_ratio_too_large_is_refused_with_the_largest_valid(dense: Any) -> None:
    with pytest.raises(ConfigError, match=r"pruning-ratio: 0.9 .* at most 0.8"):
        prune(dense, 0.9)
    prune(dense, 0.8)


def test_costs_agree_with_the_pruning_librarys_count(dense: Any, paper: nn.Module) -> None:
    import torch_pruning

    for model, channels, size in ((dense, 1, 8), (paper, 3, 32)):
        example = {
            "sample": torch.zeros(1, channels, size, size),
            "timestep": torch.zeros(1, dtype=torch.long),
        }
        theirs = torch_pruning.utils.count_ops_and_params(model, example)
        macs, parameters = macs_and_params(model)
        assert parameters == theirs[1]
        assert macs == pytest.approx(theirs[0], rel=5e-3)
    assert macs_and_params(paper)[0] == pytest.approx(6.064e9, rel=1e-3)


def test_a_devices_modules_do_not_import_the_pruning_library() -> None:
    code = (
        "import sys, espalier.models.architecture, espalier.models.unet, espalier_server.evaluation.cost, "
        "espalier.models.pipeline, espalier_client.trainer; assert 'torch_pruning' not in sys.modules; "
        "assert 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
