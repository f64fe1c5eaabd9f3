"""What the tests of networks share: random images, the number of parameters, and a description that was sent."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from espalier.models.architecture import describe
from espalier_proto import espalier_pb2 as pb


def images(count: int, channels: int = 1, size: int = 8, seed: int = 0) -> Tensor:
    """Return random images in [-1, 1], shape (count, channels, size, size)."""
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def parameter_count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def over_the_wire(network: nn.Module) -> pb.ArchitectureSpec:
    """Return a network's description, encoded and decoded."""
    return pb.ArchitectureSpec.FromString(describe(network).SerializeToString())
