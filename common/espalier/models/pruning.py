"""Structured pruning of a U-Net with DepGraph, at the cloud; no other tier needs the library.

Channels that depend on each other (a residual stream and all that reads or writes it, a block's inner channels,
the queries, keys and values of an attention layer, the time embedding) are removed together, those of least L2
norm over all their weights first, in every such group by the same ratio (DepGraph, Fang et al. 2023, with group
magnitude importance, as FedPhD uses it).
"""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch
from torch import nn

from espalier.errors import ConfigError
from espalier.models.attention import attend_as_diffusers, attend_to_pixels
from espalier.models.unet_family import heads, set_widths

#: Prevents that 5 * (1 - 0.8) = 0.9999… is truncated to 0 channels.
_ROUNDING = 1e-9


def prune(model: nn.Module, ratio: float, *, example_size: int | None = None) -> nn.Module:
    """Return a copy of a U-Net without the least important share of its channels.

    A GroupNorm keeps its number of groups and loses the same channels of each, so a width shrinks in steps of
    that number: ``groups * floor(width / groups * (1 - ratio))`` channels stay. An attention layer keeps its
    heads, each ``floor(head width * (1 - ratio))`` wide. Image channels are left alone.

    Parameters
    ----------
    model : nn.Module
        A UNet2DModel, whose weights decide what goes; left as it is.
    ratio : float
        Share of the channels of every group to remove, in (0, 1).
    example_size : int, optional
        Pixels of the image the dependencies are traced with; by default the model's size.

    Returns
    -------
    nn.Module
        The pruned copy, in training mode, on the CPU.

    Raises
    ------
    ConfigError
        The ratio is not in (0, 1) or would leave a layer without a channel.
    """
    if not 0 < ratio < 1:
        raise ConfigError(f"pruning-ratio: {ratio} is not between 0 and 1; a usual one is 0.2")
    _check_something_stays(model, ratio)
    import torch_pruning

    pruned = cast(Any, copy.deepcopy(model).cpu())
    for parameter in pruned.parameters():
        parameter.grad = None
        parameter.requires_grad_(True)
    size = example_size or pruned.config.sample_size
    example = {
        "sample": torch.zeros(1, pruned.config.in_channels, size, size),
        "timestep": torch.zeros(1, dtype=torch.long),
    }
    attend_as_diffusers(pruned)
    per_layer = _heads_of_projections(pruned)
    with torch.enable_grad():
        # Passed explicitly because the constructor's default dictionaries are shared between calls.
        pruner = torch_pruning.pruner.BasePruner(
            pruned,
            example_inputs=example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            global_pruning=False,
            pruning_ratio=ratio - _ROUNDING,
            iterative_steps=1,
            ignored_layers=[pruned.conv_out],
            in_channel_groups={},
            out_channel_groups={},
            num_heads=per_layer,
            channel_groups={},
        )
        pruner.step()
    set_widths(pruned, heads(pruned))
    attend_to_pixels(pruned)
    pruned.zero_grad(set_to_none=True)
    return cast(nn.Module, pruned.train())


def _heads_of_projections(model: nn.Module) -> dict[nn.Module, int]:
    """Map each query, key and value projection to its layer's heads."""
    modules = dict(model.named_modules())
    return {
        cast(nn.Module, getattr(modules[path], projection)): count
        for path, count in heads(model).items()
        for projection in ("to_q", "to_k", "to_v")
    }


def _check_something_stays(model: nn.Module, ratio: float) -> None:
    """Refuse a ratio at which a norm group or an attention head would lose its last channel."""
    narrowest = min(m.num_channels // m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm))
    for path, count in heads(model).items():
        attention = cast(Any, model.get_submodule(path))
        narrowest = min(narrowest, attention.to_v.out_features // count)
    if math.floor(narrowest * (1 - ratio + _ROUNDING)) < 1:
        raise ConfigError(
            f"pruning-ratio: {ratio} would leave a layer without a channel; this model allows at most "
            f"{math.floor((1 - 1 / narrowest) * 100) / 100}"
        )
