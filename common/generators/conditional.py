"""FAug's conditional GAN: four fully connected layers each way, trained at the cloud on a few seed images."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from common.data.imageset import to_float
from common.models.arrays import to_array, to_tensor

#: Length of what goes into the generator: noise, and the class as a one-hot vector.
INPUT = 128
#: Hidden layers; with 784 pixels the generator has the paper's 1,493,520 parameters.
HIDDEN = (256, 512, 1024)
#: Prefix of its tensors on a link.
SECTION = "generator/"


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
        hidden = torch.cat([noise, functional.one_hot(labels, self.classes).float()], 1)
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
        """Return its tensors by their names on a link."""
        return {SECTION + n: to_array(t).copy() for n, t in self.state_dict().items()}

    @classmethod
    def of(
        cls, arrays: Mapping[str, np.ndarray], classes: int, shape: tuple[int, int, int]
    ) -> ConditionalGenerator:
        """Build a generator from received tensors; raises ValueError where they do not fit."""
        model = cls(classes, shape)
        tensors = {n.removeprefix(SECTION): to_tensor(a) for n, a in arrays.items() if n.startswith(SECTION)}
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
        widths = (int(np.prod(shape)) + classes, *reversed(HIDDEN), 1)
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
    evenly and their seeds with small random shifts, because a service that looks images up is not a federation's
    to assume. Non-saturating loss, Adam (2e-4, betas 0.5 and 0.999).

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
            torch.optim.Adam(m.parameters(), lr=2e-4, betas=(0.5, 0.999)) for m in (generator, critic)
        ]
        held = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        for _ in range(steps):
            chosen = np.array([rng.choice(held[i]) for i in rng.integers(len(held), size=batch)])
            real = _shifted(to_float(torch.from_numpy(pixels[chosen])), random).to(device)
            marks = torch.from_numpy(labels[chosen]).to(device)
            noise = torch.randn(batch, INPUT - classes, generator=random).to(device)
            drawn = generator(noise, marks)
            loss = (
                functional.softplus(-critic(real, marks)) + functional.softplus(critic(drawn.detach(), marks))
            ).mean()
            optimizers[1].zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizers[1].step()
            fooled = functional.softplus(-critic(drawn, marks)).mean()
            optimizers[0].zero_grad()
            fooled.backward()  # type: ignore[no-untyped-call]
            optimizers[0].step()
    return generator.cpu().eval()


def _shifted(images: Tensor, random: Generator) -> Tensor:
    """Move each image by up to a twelfth of its size either way."""
    reach = max(1, images.shape[-1] // 12)
    padded = functional.pad(images, (reach,) * 4, mode="replicate")
    size = images.shape[-1]
    offsets = torch.randint(2 * reach + 1, (len(images), 2), generator=random).tolist()
    return torch.stack([p[:, y : y + size, x : x + size] for p, (y, x) in zip(padded, offsets, strict=True)])
