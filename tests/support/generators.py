"""A generator's folder for FedKTL in tests: Espalier's own small GAN with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from espalier_server.generators.gan import save_gan
from espalier_server.generators.networks import GanConfig, StyleGenerator


def random_gan(folder: Path, *, size: int = 8, channels: int = 1, latent_dim: int = 16) -> str:
    """Write an untrained generator of 10 classes and return what `generator=` takes."""
    config = GanConfig(size=size, channels=channels, classes=10, latent_dim=latent_dim, width=64)
    network = StyleGenerator(config, torch.Generator().manual_seed(3))
    save_gan(folder, network, {}, Image.new("L", (8, 8)))
    return f"gan:{folder}"
