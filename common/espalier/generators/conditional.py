"""FAug's conditional GAN: four fully connected layers each way, trained at the cloud on a few seed images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from espalier.data.imageset import to_float
from espalier.models.arrays import to_array, to_tensor

#: Length of what goes into the generator: noise, and the class as a one-hot vector.
INPUT = 128
#: Hidden layers; with 784 pixels the generator has the paper's 1,493,520 parameters.
HIDDEN = (256, 512, 1024)
#: What the class's 1 is multiplied by: beside more than a hundred noise numbers a plain 1 goes unheard.
CLASS_WEIGHT = 6.0
#: Hidden layers of the discriminator, which stays at the cloud: four layers, and cheap ones.
JUDGING = (512, 256, 128)
#: Weight of the distance to the nearest drawn image, and of how many for each real one.
NEAREST, CANDIDATES = 200.0, 4
#: Weight of the adversarial loss beside it, and the generator's learning rate; the discriminator's is half.
ADVERSARIAL, RATE = 0.3, 1e-3
#: How far the copies of a seed are turned (degrees), and scaled, sheared and shifted (shares of the size).
TURN, SCALE, SHEAR, SHIFT = 8.0, 0.08, 0.08, 0.04


class ConditionalGenerator(nn.Module):
    """(noise, class) -> image in [-1, 1].

    Parameters
    ----------
    classes : int
        Number of classes, less than `INPUT`.
    shape : tuple of int
        Channels, height, width.
    """

    def __init__(self, classes: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        if not 1 <= classes < INPUT:
            raise ValueError(f"a conditional generator of {classes} classes; 1 to {INPUT - 1} are possible")
        self.classes, self.shape = classes, shape
        widths = (INPUT, *HIDDEN, int(np.prod(shape)))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Return images float32 [B, C, H, W] for noise [B, INPUT - classes] and labels int64 [B]."""
        mark = CLASS_WEIGHT * functional.one_hot(labels, self.classes).float()
        hidden = torch.cat([noise, mark], 1)
        for layer in self.layers[:-1]:
            hidden = functional.leaky_relu(layer(hidden), 0.2)
        return torch.tanh(self.layers[-1](hidden)).view(-1, *self.shape)

    def draw(self, labels: np.ndarray, seed: int) -> Tensor:
        """Return an image for each label, on the CPU; noise depends on the seed alone."""
        random = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(labels), INPUT - self.classes, generator=random)
        place = next(self.parameters()).device
        with torch.no_grad():
            drawn: Tensor = self(noise.to(place), torch.from_numpy(labels).to(place))
        return drawn.cpu()

    def arrays(self) -> dict[str, np.ndarray]:
        """Return its tensors by name."""
        return {n: to_array(t).copy() for n, t in self.state_dict().items()}

    @classmethod
    def of(
        cls, arrays: Mapping[str, np.ndarray], classes: int, shape: tuple[int, int, int]
    ) -> ConditionalGenerator:
        """Build a generator from received tensors; raises ValueError where they do not fit."""
        model = cls(classes, shape)
        tensors = {n: to_tensor(a) for n, a in arrays.items()}
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"tensors that are no generator of these images ({error})") from error
        return model


class Discriminator(nn.Module):
    """(image, class) -> how real it looks."""

    def __init__(self, classes: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.classes = classes
        widths = (int(np.prod(shape)) + classes, *JUDGING, 1)
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

    The seeds are oversampled as the paper has it, but not from an image search: every batch draws labels
    evenly and their seeds a little turned, scaled, sheared and shifted, because a service that looks images up
    is not a federation's to assume. Non-saturating loss, Adam.

    A label has some fifteen seeds. Of so few the adversarial loss alone makes noise in the steps that a CPU has time
    for, or one image a label; so each real image also draws the nearest of several generated ones towards
    itself (IMLE: Li and Malik 2018, arXiv 1809.09087), which no seed escapes.

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
        Seed of all that is random.
    device : torch.device or str
        Where to train.
    batch : int
        Images a step.

    Returns
    -------
    ConditionalGenerator
        On the CPU, in evaluation mode.
    """
    shape: tuple[int, int, int] = pixels.shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = ConditionalGenerator(classes, shape).to(device)
        critic = Discriminator(classes, shape).to(device)
        random = torch.Generator().manual_seed(seed)
        rng = np.random.default_rng(seed)
        optimizers = [
            torch.optim.Adam(m.parameters(), lr=RATE, betas=(0.5, 0.99), fused=True)
            for m in (generator, critic)
        ]
        held = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        for step in range(steps):
            rate = RATE * min(1.0, max(0.1, 3 * (1 - step / steps)))
            optimizers[0].param_groups[0]["lr"], optimizers[1].param_groups[0]["lr"] = rate, rate / 2
            chosen = np.array([rng.choice(held[i]) for i in rng.integers(len(held), size=batch)])
            real = _moved(to_float(torch.from_numpy(pixels[chosen])), random).to(device)
            marks = torch.from_numpy(labels[chosen]).to(device)
            noise = torch.randn(CANDIDATES * batch, INPUT - classes, generator=random).to(device)
            drawn = generator(noise[:batch], marks)
            found = functional.softplus(-critic(real, marks)) + functional.softplus(
                critic(drawn.detach(), marks)
            )
            _update(optimizers[1], found.mean())
            near = generator(noise[_nearest(generator, noise, real, marks)], marks)
            deceived = functional.softplus(-critic(drawn, marks)).mean()
            _update(optimizers[0], ADVERSARIAL * deceived + NEAREST * (near - real).square().mean())
    return generator.cpu().eval()


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _nearest(generator: ConditionalGenerator, noise: Tensor, real: Tensor, labels: Tensor) -> Tensor:
    """Return for each real image the place of the noise whose image of its class lies nearest."""
    marks = labels.repeat(CANDIDATES)
    with torch.no_grad():
        apart = torch.cdist(real.flatten(1), generator(noise, marks).flatten(1))
    return apart.masked_fill(labels[:, None] != marks, math.inf).argmin(1)


def _moved(images: Tensor, random: Generator) -> Tensor:
    """Turn, scale, shear and shift each image a little; what comes in at the edges repeats them."""

    def within(reach: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=random) - 1) * reach

    angle, scale, shear = within(math.radians(TURN)), torch.exp(within(SCALE)), within(SHEAR)
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    # Coordinates run from -1 to 1, so that a share of the size is twice as much of them.
    rows = [
        torch.stack((cosine, shear * cosine - sine, within(2 * SHIFT)), 1),
        torch.stack((sine, shear * sine + cosine, within(2 * SHIFT)), 1),
    ]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
