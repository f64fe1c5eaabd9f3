"""Size of a network: parameters, and multiply-accumulate operations of one forward pass."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from espalier.models.architecture import FAMILIES, build, describe
from espalier_proto import espalier_pb2 as pb


def macs_and_params(model: nn.Module) -> tuple[int, int]:
    """Count a network's operations and parameters.

    Operations are the multiply-accumulates for one image of the network's image size: one per use of a weight of a
    convolution or linear layer, and two per element of a normalisation (normalise, scale and shift). Biases,
    activations and the products of queries, keys and values are not counted, as in the 6.06 GMACs that FedPhD and
    Diff-Pruning report for the U-Net of DDPM on CIFAR-10.

    Parameters
    ----------
    model : nn.Module
        A network of a registered family whose configuration has an image size; a copy of it is run.

    Returns
    -------
    tuple of int
        Multiply-accumulates and parameters.
    """
    return spec_cost(describe(model))


def spec_cost(spec: pb.ArchitectureSpec) -> tuple[int, int]:
    """Count operations and parameters of an architecture; see :func:`macs_and_params`.

    Raises
    ------
    ValueError
        The description is invalid or has no image size.
    """
    model = build(spec).eval()
    inputs = FAMILIES[spec.family].inputs(model)
    macs = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        nonlocal macs
        if isinstance(module, nn.MultiheadAttention):
            # The module uses its output layer's weights without calling the layer, so no hook counts them.
            weights = module.in_proj_weight.numel() + module.out_proj.weight.numel()
            macs += weights * (output[0].numel() // module.embed_dim)
        elif isinstance(module, nn.GroupNorm | nn.BatchNorm2d | nn.LayerNorm):
            macs += 2 * output.numel()
        else:
            weight = cast(Tensor, module.weight)
            # Each weight is used once per output position (a grouped convolution has fewer weights).
            macs += weight.numel() * (output.numel() // weight.shape[0])

    counted = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.BatchNorm2d, nn.LayerNorm, nn.MultiheadAttention)
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, counted)]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return macs, sum(p.numel() for p in model.parameters())
