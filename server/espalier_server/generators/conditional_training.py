"""Training of FAug's conditional GAN at the cloud, on a few seed images (Jeong et al. 2018)."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from espalier.data.imageset import to_float
from espalier.generators.conditional import INPUT, ConditionalGenerator

#: Widths of the discriminator's hidden layers.
HIDDEN = (512, 256, 128)
#: Weight of the distance to the nearest generated image, and number of candidates for each real one.
NEAREST, CANDIDATES = 200.0, 4
#: Weight of the adversarial loss, and the generator's learning rate; the discriminator's is half of it.
ADVERSARIAL, RATE = 0.3, 1e-3
#: Limits of the augmentation: rotation in degrees; scale, shear and shift as shares of the size.
TURN, SCALE, SHEAR, SHIFT = 8.0, 0.08, 0.08, 0.04


class Discriminator(nn.Module):
    """Maps an image and its class to the logit of the image being real."""

    def __init__(self, classes: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.classes = classes
        widths = (int(np.prod(shape)) + classes, *HIDDEN, 1)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return logits [B]."""
        hidden = torch.cat([images.flatten(1), functional.one_hot(labels, self.classes).float()], 1)
        for layer in self.layers[:-1]:
            hidden = functional.dropout(functional.leaky_relu(layer(hidden), 0.2), 0.3, self.training)
        logits: Tensor = self.layers[-1](hidden)
        return logits[:, 0]


def train_conditional(
    pixels: np.ndarray,
    labels: np.ndarray,
    classes: int,
    *,
    steps: int,
    seed: int,
    device: torch.device | str = "cpu",
    batch: int = 64,
) -> ConditionalGenerator:
    """Train a conditional GAN on seed images.

    As in the paper the seeds are oversampled, but by augmentation and not by an image search, which needs an external
    service: every batch draws labels uniformly, and rotates, scales, shears and shifts their seeds a little. The loss
    is the non-saturating one, the optimiser Adam.

    A label has about fifteen seeds. With so few the adversarial loss alone yields noise within the steps that a CPU can
    do, or a single image per label. So the nearest of several generated images is also pulled towards each real one
    (IMLE: Li and Malik 2018, arXiv 1809.09087), which covers every seed.

    Parameters
    ----------
    pixels : numpy.ndarray
        uint8 [N, C, H, W].
    labels : numpy.ndarray
        int64 [N].
    classes : int
        Number of classes.
    steps : int
        Steps of generator and discriminator.
    seed : int
        Seed of all randomness.
    device : torch.device or str
        Where to train.
    batch : int
        Images per step.

    Returns
    -------
    ConditionalGenerator
        On the CPU, in evaluation mode.
    """
    shape: tuple[int, int, int] = pixels.shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = ConditionalGenerator(classes, shape).to(device)
        discriminator = Discriminator(classes, shape).to(device)
        random = torch.Generator().manual_seed(seed)
        rng = np.random.default_rng(seed)
        optimizers = [
            torch.optim.Adam(m.parameters(), lr=RATE, betas=(0.5, 0.99), fused=True)
            for m in (generator, discriminator)
        ]
        by_label = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        for step in range(steps):
            rate = RATE * min(1.0, max(0.1, 3 * (1 - step / steps)))
            optimizers[0].param_groups[0]["lr"], optimizers[1].param_groups[0]["lr"] = rate, rate / 2
            chosen = np.array([rng.choice(by_label[i]) for i in rng.integers(len(by_label), size=batch)])
            real = _augmented(to_float(torch.from_numpy(pixels[chosen])), random).to(device)
            targets = torch.from_numpy(labels[chosen]).to(device)
            noise = torch.randn(CANDIDATES * batch, INPUT - classes, generator=random).to(device)
            drawn = generator(noise[:batch], targets)
            found = functional.softplus(-discriminator(real, targets)) + functional.softplus(
                discriminator(drawn.detach(), targets)
            )
            _update(optimizers[1], found.mean())
            near = generator(noise[_nearest(generator, noise, real, targets)], targets)
            adversarial = functional.softplus(-discriminator(drawn, targets)).mean()
            _update(optimizers[0], ADVERSARIAL * adversarial + NEAREST * (near - real).square().mean())
    return generator.cpu().eval()


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _nearest(generator: ConditionalGenerator, noise: Tensor, real: Tensor, labels: Tensor) -> Tensor:
    """Return for each real image the index of the noise whose generated image of its class is nearest."""
    targets = labels.repeat(CANDIDATES)
    with torch.no_grad():
        distances = torch.cdist(real.flatten(1), generator(noise, targets).flatten(1))
    return distances.masked_fill(labels[:, None] != targets, math.inf).argmin(1)


def _augmented(images: Tensor, random: Generator) -> Tensor:
    """Rotate, scale, shear and shift each image a little; border pixels are repeated."""

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=random) - 1) * limit

    angle, scale, shear = uniform(math.radians(TURN)), torch.exp(uniform(SCALE)), uniform(SHEAR)
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    # Coordinates range from -1 to 1, so a share of the size is twice that number.
    rows = [
        torch.stack((cosine, shear * cosine - sine, uniform(2 * SHIFT)), 1),
        torch.stack((sine, shear * sine + cosine, uniform(2 * SHIFT)), 1),
    ]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
