"""Training of the small GAN for FedKTL, a few minutes on one CPU core."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from espalier.data.imageset import ImageSet
from espalier.errors import ConfigError
from espalier.seeds import rng_for, seed_for
from espalier.training.objectives import TrainingError
from espalier_server.evaluation.image_grid import image_grid
from espalier_server.generators.networks import GROUP, Discriminator, GanConfig, StyleGenerator, native_size


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of the GAN's training; the defaults are tuned for 8x8 digits and MNIST in three minutes.

    Attributes
    ----------
    batch : int
        Images per step, in groups of four of the same class.
    rate : float
        Adam's learning rate; it falls to a tenth over the last third of the training.
    r1 : float
        gamma of the R1 penalty.
    r1_every : int
        Steps between two penalties, each multiplied by this number (lazy regularisation, StyleGAN2 section 4).
    average : float
        Largest decay of the moving average of the weights, which is the result.
    shift : int
        Largest random shift, in pixels, of the discriminator's real and generated inputs.
    """

    batch: int = 32
    rate: float = 2e-3
    r1: float = 1.0
    r1_every: int = 8
    average: float = 0.995
    shift: int = 0


@dataclass(frozen=True)
class Progress:
    """Progress of a training: step, seconds, completed share, mean losses since the previous report."""

    step: int
    seconds: float
    share: float
    generator_loss: float
    discriminator_loss: float


def pretrain(
    data: ImageSet,
    *,
    minutes: float | None = 3.0,
    steps: int | None = None,
    seed: int = 0,
    latent_dim: int = 128,
    device: torch.device | None = None,
    recipe: Recipe | None = None,
    say: Callable[[Progress], None] = lambda _: None,
    every: float = 10.0,
) -> tuple[StyleGenerator, dict[str, Any]]:
    """Train a class-conditional generator on a data set.

    Non-saturating logistic loss (Goodfellow et al. 2014), R1 penalty on real images (Mescheder et al. 2018,
    arXiv 1801.04406) computed lazily, moving average of the generator's weights.

    Parameters
    ----------
    data : ImageSet
        Grey or RGB images; resized to the next size that a generator can have.
    minutes : float, optional
        Training time in minutes of wall-clock time; not used if `steps` is given.
    steps : int, optional
        Number of steps; the result then does not depend on the machine's speed.
    seed : int
        Seed of the weights, the order of the data and the noise.
    latent_dim : int
        Length H of a latent.
    device : torch.device, optional
        Device to train on; by default the CPU.
    recipe : Recipe, optional
        Hyperparameters.
    say : callable, optional
        Called with the progress.
    every : float
        Seconds between two calls.

    Returns
    -------
    StyleGenerator
        The moving average, in evaluation mode, on `device`.
    dict
        Notes: data, steps, seconds, seed, images seen, and the recipe.

    Raises
    ------
    ConfigError
        The time or size is out of range, or the images are neither grey nor RGB.
    TrainingError
        A loss is not finite.
    """
    recipe, device = recipe or Recipe(), device or torch.device("cpu")
    limit = math.inf if minutes is None or steps is not None else minutes * 60
    if not (limit > 0 and (steps is None or steps > 0) and (steps or limit < math.inf)):
        raise ConfigError("pretrain-generator: give a positive number of minutes or steps")
    channels, size, _ = data.shape
    if channels not in (1, 3) or latent_dim < 1:
        raise ConfigError(
            f"pretrain-generator: images of {channels} channels and latents of length {latent_dim} are not "
            "possible; use grey or RGB images and a positive length"
        )
    config = GanConfig(native_size(size), channels, len(data.classes), latent_dim)
    training = _Training(config, recipe, data, seed, device)
    start = said = time.monotonic()
    share, step = 0.0, 0
    sums = [0.0, 0.0, 0]
    while share < 1:
        losses = training.step(step, share)
        step += 1
        seconds = time.monotonic() - start
        share = step / steps if steps else seconds / limit
        sums = [sums[0] + losses[0], sums[1] + losses[1], sums[2] + 1]
        if not math.isfinite(sum(losses)):
            raise TrainingError(
                f"pretrain-generator: the loss is {losses[0] + losses[1]} at step {step}; try another --seed"
            )
        if share >= 1 or time.monotonic() - said >= every:
            said = time.monotonic()
            say(Progress(step, seconds, min(share, 1.0), sums[0] / sums[2], sums[1] / sums[2]))
            sums = [0.0, 0.0, 0]
    notes = {
        "data": data.name,
        "classes": list(data.classes),
        "steps": step,
        "seconds": round(time.monotonic() - start, 1),
        "seed": seed,
        "images_seen": step * max(1, recipe.batch // GROUP) * GROUP,
        "recipe": vars(recipe),
    }
    return training.average.eval(), notes


class _Training:
    """Networks, optimisers and random generators of one training."""

    def __init__(
        self, config: GanConfig, recipe: Recipe, data: ImageSet, seed: int, device: torch.device
    ) -> None:
        weights = torch.Generator().manual_seed(seed_for(seed, "generator", 0, "weights"))
        self.rng = torch.Generator().manual_seed(seed_for(seed, "generator", 0, "noise"))
        self.order = rng_for(seed, "generator", 0, "order")
        self.recipe, self.data, self.device, self.config = recipe, data, device, config
        self.members = {label: np.flatnonzero(data.labels == label) for label in np.unique(data.labels)}
        self.generator = StyleGenerator(config, weights).to(device)
        self.discriminator = Discriminator(config, weights).to(device)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=recipe.rate, betas=(0.0, 0.99), fused=True)
            for network in (self.generator, self.discriminator)
        ]

    def step(self, step: int, share: float) -> tuple[float, float]:
        """Train both networks for one step and return their losses; `share` is the completed share of the training."""
        rate = self.recipe.rate * min(1.0, max(0.1, 3 * (1 - share)))
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = rate
        indices = self._draw()
        real = self._native(self.data.fetch(indices)).to(self.device)
        classes = torch.from_numpy(self.data.labels[indices]).to(self.device)
        z = torch.randn(len(real), self.config.latent_dim, generator=self.rng).to(self.device)
        fake = self.generator(z, classes)

        self.discriminator.requires_grad_(True)
        penalised = step % self.recipe.r1_every == 0
        seen = self._shifted(real).requires_grad_(penalised)
        scores = self.discriminator(seen, classes)
        found = functional.softplus(-scores).mean()
        found = found + functional.softplus(self.discriminator(self._shifted(fake.detach()), classes)).mean()
        loss = found
        if penalised:
            (slope,) = torch.autograd.grad(scores.sum(), seen, create_graph=True)
            loss = loss + self.recipe.r1 / 2 * self.recipe.r1_every * slope.square().sum((1, 2, 3)).mean()
        self._update(1, loss)

        self.discriminator.requires_grad_(False)
        adversarial = functional.softplus(-self.discriminator(self._shifted(fake), classes)).mean()
        self._update(0, adversarial)
        decay = min(self.recipe.average, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, new in zip(self.average.parameters(), self.generator.parameters(), strict=True):
                mean.lerp_(new, 1 - decay)
        return adversarial.item(), found.item()

    def _draw(self) -> NDArray[np.int64]:
        """Draw image indices in groups of the same class.

        The discriminator then measures the variation within a class, so that the generator cannot collapse to one image
        per class, as it does with groups of mixed classes.
        """
        labels = self.data.labels
        first = self.order.integers(len(labels), size=max(1, self.recipe.batch // GROUP))
        groups = [self.order.choice(self.members[labels[index]], GROUP - 1) for index in first]
        return np.concatenate((first[None], np.stack(groups, 1))).ravel()

    def _update(self, which: int, loss: Tensor) -> None:
        self.optimizers[which].zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizers[which].step()

    def _native(self, images: Tensor) -> Tensor:
        size = self.config.size
        if images.shape[-1] == size:
            return images
        return functional.interpolate(
            images, (size, size), mode="bilinear", antialias=True, align_corners=False
        )

    def _shifted(self, images: Tensor) -> Tensor:
        """Shift each image by a random offset; border pixels are repeated."""
        reach = self.recipe.shift
        if not reach:
            return images
        count, _, size, _ = images.shape
        padded = functional.pad(images, (reach,) * 4, mode="replicate")
        offsets = torch.randint(2 * reach + 1, (2, count, 1), generator=self.rng).to(images.device)
        rows, columns = offsets + torch.arange(size, device=images.device)
        batch = torch.arange(count, device=images.device)
        moved: Tensor = padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return moved.permute(0, 3, 1, 2)


def sample_grid(network: nn.Module, *, seed: int, rows: int = 6) -> Any:
    """Return a grid of `rows` images per class, with one column per class (at most 16).

    Parameters
    ----------
    network : StyleGenerator
        The generator.
    seed : int
        Seed of the noise.
    rows : int
        Images per class.
    """
    assert isinstance(network, StyleGenerator)
    columns = min(network.config.classes, 16)
    rng = torch.Generator().manual_seed(seed_for(seed, "generator", 0, "samples"))
    z = torch.randn(rows * columns, network.config.latent_dim, generator=rng)
    device = network.synthesis.constant.device
    classes = torch.arange(columns).repeat(rows)
    with torch.no_grad():
        images = network(z.to(device), classes.to(device))
    return image_grid(images, columns=columns)
