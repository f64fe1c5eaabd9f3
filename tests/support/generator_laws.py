"""What every generator promises, checked on an instance."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from espalier.errors import ConfigError
from espalier.generators.base import Generator


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check(generator: Generator, latent_dim: int) -> None:
    """Check what every generator promises."""
    assert generator.latent_dim == latent_dim
    latents = generator.sample_latents(5, seeded(1))
    assert latents.shape == (5, latent_dim)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, generator.sample_latents(5, seeded(1)))
    assert not torch.allclose(latents, generator.sample_latents(5, seeded(2)))
    latents.requires_grad_(False).add_(0)  # no inference tensor: F is trained on them
    (nn.Parameter(torch.ones(latent_dim)) * latents).sum().backward()  # type: ignore[no-untyped-call]
    for channels, size in ((1, 8), (3, 12)):
        images = generator.synthesise(latents, size, channels)
        assert images.shape == (5, channels, size, size)
        assert images.dtype == torch.float32
        assert images.abs().max() <= 1
        assert torch.equal(images, generator.synthesise(latents.clone(), size, channels))
        assert (images[0] - images[1]).abs().max() > 1e-4
        # An image depends on its own latent, whatever is drawn beside it.
        alone = generator.synthesise(latents[3:4], size, channels)
        torch.testing.assert_close(alone[0], images[3], atol=1e-4, rtol=0)
    assert generator.synthesise(latents[:0], 8, 3).shape == (0, 3, 8, 8)
    with pytest.raises(ConfigError, match="use grey or RGB"):
        generator.synthesise(latents[:1], 8, 2)
