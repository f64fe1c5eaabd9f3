"""UNet2DModel as an architecture family: validated arguments, and the sizes that its blocks store after pruning."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from espalier.diffusers_shim import import_diffusers
from espalier.models.attention import attend_to_pixels
from espalier.models.checks import validated, verify_layers

if TYPE_CHECKING:
    from diffusers import UNet2DModel

_DownBlock = Literal["DownBlock2D", "AttnDownBlock2D"]
_UpBlock = Literal["UpBlock2D", "AttnUpBlock2D"]
_Width = Annotated[int, Field(ge=1, le=16384)]
_Size = Annotated[int, Field(ge=1, le=4096)]


class UNetArguments(BaseModel):
    """The constructor arguments of UNet2DModel that a description may contain, and their ranges.

    Every argument of the constructor is here (a test compares them); some accept a single value.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    sample_size: _Size | None = None
    in_channels: _Width = 3
    out_channels: _Width = 3
    center_input_sample: bool = False
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: _Width | None = None
    freq_shift: Annotated[int, Field(ge=0, le=1)] = 0
    flip_sin_to_cos: bool = True
    down_block_types: Annotated[list[_DownBlock], Field(min_length=1, max_length=8)]
    mid_block_type: Literal["UNetMidBlock2D"] | None = "UNetMidBlock2D"
    up_block_types: Annotated[list[_UpBlock], Field(min_length=1, max_length=8)]
    block_out_channels: Annotated[list[_Width], Field(min_length=1, max_length=8)]
    layers_per_block: Annotated[int, Field(ge=1, le=8)] = 2
    mid_block_scale_factor: Annotated[float, Field(gt=0)] = 1
    downsample_padding: Annotated[int, Field(ge=0, le=1)] = 1
    downsample_type: Literal["conv"] = "conv"
    upsample_type: Literal["conv"] = "conv"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    attention_head_dim: _Width | None = 8
    norm_num_groups: _Width = 32
    attn_norm_num_groups: _Width | None = None
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    add_attention: bool = True
    class_embed_type: None = None
    num_class_embeds: None = None
    num_train_timesteps: None = None


def matches(model: nn.Module) -> bool:
    """Whether a module is a UNet2DModel; does not import diffusers."""
    module = sys.modules.get("diffusers.models.unets.unet_2d")
    return module is not None and isinstance(model, module.UNet2DModel)


def config(model: nn.Module) -> dict[str, Any]:
    """Return the constructor arguments of a UNet2DModel as JSON values, without diffusers' internal entries."""
    values = dict(cast(Any, model).config)
    known = UNetArguments.model_fields
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if k in known}


def construct(arguments: dict[str, Any]) -> nn.Module:
    """Build a UNet2DModel from received arguments.

    Raises
    ------
    ValueError
        An argument is unknown, of another type or out of range, or diffusers rejects their combination.
    """
    checked = validated(UNetArguments, arguments, "unet")
    levels = {len(checked.down_block_types), len(checked.up_block_types), len(checked.block_out_channels)}
    if len(levels) > 1:
        raise ValueError("the unet's down blocks, up blocks and widths differ in number")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in checked.model_dump().items()}
    return cast(nn.Module, assemble(values))


def assemble(arguments: dict[str, Any]) -> UNet2DModel:
    """Build a UNet2DModel from validated arguments, with the attention of `espalier.models.attention`."""
    network: UNet2DModel = import_diffusers().UNet2DModel(**arguments)
    attend_to_pixels(network)
    return network


def heads(model: nn.Module) -> dict[str, int]:
    """Return the number of heads of every attention layer, by module path."""
    from diffusers.models.attention_processor import Attention

    return {path: m.heads for path, m in model.named_modules() if isinstance(m, Attention)}


def set_sizes(model: nn.Module, described: Mapping[str, int]) -> None:
    """Set the sizes that diffusers' blocks store besides their tensors; `verify_unet` checks that the layers match.

    Parameters
    ----------
    model : nn.Module
        A UNet2DModel on ``meta`` whose layers have their described widths.
    described : mapping of str to int
        Heads of every attention layer, by module path.

    Raises
    ------
    ValueError
        Heads are missing or do not divide a width.
    """
    own = heads(model)
    if set(described) != set(own):
        path = min(set(described) ^ set(own))
        raise ValueError(
            f"attention {path!r} " + ("has no heads" if path in own else "is not part of the network")
        )
    set_widths(model, described)


def set_widths(model: nn.Module, heads_of: Mapping[str, int]) -> None:
    """Set the channel counts that diffusers' blocks store to those of their layers.

    Raises
    ------
    ValueError
        An attention layer's width is not a multiple of its number of heads.
    """
    from diffusers.models.attention_processor import Attention
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    for path, module in model.named_modules():
        if isinstance(module, Attention):
            inner, count = module.to_v.out_features, heads_of[path]
            if count < 1 or inner % count:
                raise ValueError(f"attention {path!r} is {inner} wide, not a multiple of {count} heads")
            module.heads = module.sliceable_head_dim = count
            module.inner_dim = module.to_q.out_features
            module.inner_kv_dim = inner
            module.query_dim = module.cross_attention_dim = module.to_q.in_features
            module.out_dim = module.to_out[0].out_features
            module.scale = (inner // count) ** -0.5
        elif isinstance(module, ResnetBlock2D):
            module.in_channels, module.out_channels = module.conv1.in_channels, module.conv2.out_channels
        elif isinstance(module, Downsample2D | Upsample2D):
            conv = cast(nn.Conv2d, module.conv)
            module.channels, module.out_channels = conv.in_channels, conv.out_channels


def inputs(model: nn.Module) -> tuple[Tensor, ...]:
    """Return an image of the network's size and a time step, on ``meta``.

    Raises
    ------
    ValueError
        The network's configuration names no image size.
    """
    network = cast(Any, model)
    size = network.config.sample_size
    if size is None:
        raise ValueError("the architecture names no image size, so its operations cannot be counted")
    return _inputs(network, size)


def _inputs(network: Any, size: int) -> tuple[Tensor, Tensor]:
    shape = (1, network.config.in_channels, size, size)
    image = torch.empty(shape, device="meta", dtype=network.dtype)
    return image, torch.zeros(1, dtype=torch.long, device="meta")


def verify_unet(model: nn.Module) -> None:
    """Run the network once on ``meta``; raises ValueError if the widths of two layers do not match."""
    network = cast(Any, model)
    side = 2 ** len(network.config.block_out_channels)
    image, step = _inputs(network, side)
    verify_layers(
        model,
        lambda: cast(Tensor, network(image, step, return_dict=False)[0]),
        tuple(image.shape),
        (1, network.config.out_channels, side, side),
    )
