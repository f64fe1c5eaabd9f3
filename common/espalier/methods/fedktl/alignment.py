"""FedKTL at the cloud: training the feature transformer F from clients' prototypes to a generator's latents.

F is trained so that its outputs have the distribution of the generator's latents (MMD) and those of one class are close
together (class separability). The centroid of a class is the mean of F over its prototypes, as the paper intends; the
authors' code learns a table that only tracks that mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from espalier.models.arrays import load_arrays, to_array
from espalier.seeds import seed_for
from espalier.training.objectives import TrainingError

#: A generator's own latents: from a count and a torch generator to float32 [count, H].
LatentSource = Callable[[int, Generator], Tensor]

#: Squared bandwidths of the sum of Gaussian kernels (the authors' code).
BANDWIDTHS = (10.0, 15.0, 20.0, 50.0)


class FeatureTransformer(nn.Sequential):
    """F: ``Linear(K, K), BatchNorm1d, ReLU, Linear(K, H)``.

    Its batch normalisation has no running statistics: F is only applied to the prototypes it is trained on, to all of
    them at once for the centroids.

    Parameters
    ----------
    dimension : int
        K, length of a prototype.
    latent_dim : int
        H, length of a latent.
    run_seed : int
        Seed of the initial weights.
    """

    def __init__(self, dimension: int, latent_dim: int, run_seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(run_seed, "cloud", 0, "feature transformer"))
            super().__init__(
                nn.Linear(dimension, dimension),
                nn.BatchNorm1d(dimension, track_running_stats=False),
                nn.ReLU(),
                nn.Linear(dimension, latent_dim),
            )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return copies of its tensors, which the cloud stores between rounds."""
        return {name: to_array(tensor).copy() for name, tensor in self.state_dict().items()}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Load the tensors that `arrays` returned."""
        load_arrays(self, arrays)


@dataclass(frozen=True, eq=False)
class Alignment:
    """Result of :func:`align`.

    Attributes
    ----------
    labels : numpy.ndarray
        int64 [m], ascending: the classes with a prototype.
    centroids : numpy.ndarray
        float32 [m, H], Q: the latents from which the generator draws each class's image.
    mmd, separability : tuple of float
        The two losses per epoch, means over its steps; the second without its weight.
    """

    labels: np.ndarray
    centroids: np.ndarray
    mmd: tuple[float, ...]
    separability: tuple[float, ...]


def mmd(a: Tensor, b: Tensor, bandwidths: tuple[float, ...] = BANDWIDTHS) -> Tensor:
    """Return the squared maximum mean discrepancy of two samples, the biased estimate.

    ``mean k(a, a') + mean k(b, b') - 2 mean k(a, b)`` with ``k(x, y) = sum_s exp(-|x - y|^2 / (2 s))``.

    Parameters
    ----------
    a, b : Tensor
        [n, H] and [m, H].
    bandwidths : tuple of float
        The s of the kernels. They fit latents whose squared distances are of the same order. For much larger distances,
        as of thousands of standard normal dimensions, every kernel between two different points underflows to 0,
        and so does the gradient.
    """
    return _kernel(a, a, bandwidths) + _kernel(b, b, bandwidths) - 2 * _kernel(a, b, bandwidths)


def class_means(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the means [C, D] of values [n, D] by label int64 [n]; 0 for a class without values."""
    sums = values.new_zeros(classes, values.shape[1]).index_add_(0, labels, values)
    return sums / torch.bincount(labels, minlength=classes).clamp(min=1)[:, None]


def align(
    transformer: FeatureTransformer,
    prototypes: np.ndarray,
    labels: np.ndarray,
    latents: LatentSource,
    *,
    generator: Generator,
    weight: float = 1.0,
    epochs: int = 100,
    batch: int = 100,
    rate: float = 0.01,
    clip: float = 100.0,
    bandwidths: tuple[float, ...] = BANDWIDTHS,
) -> Alignment:
    """Train F in place on a round's prototypes and return the classes' centroids.

    The loss of a batch is ``MMD(F(P), w) + weight * MSE(F(P), Q_y)`` with as many new latents w as the batch has
    rows. Q is the mean of F over *all* rows of a class under the current weights, without a gradient: with all
    rows in one batch its gradient would be 0, and a Q from an earlier epoch would slow F down. Every call creates
    a new Adam. A last batch of a single row, which batch normalisation does not accept, is skipped.

    Parameters
    ----------
    transformer : FeatureTransformer
        On its device.
    prototypes : numpy.ndarray
        float32 [n, K], one row per client and class.
    labels : numpy.ndarray
        int64 [n].
    latents : callable
        Samples the generator's latents.
    generator : Generator
        Seeds order and latents; on the CPU, so that all devices draw the same numbers.
    weight : float
        lambda, of the class separability.
    epochs, batch : int
        Epochs, and rows at a time.
    rate, clip : float
        Step size of Adam, and the largest norm of the gradient.
    bandwidths : tuple of float
        As for :func:`mmd`.

    Returns
    -------
    Alignment
        Without centroids if there are fewer than two rows, over which batch normalisation is not defined; clients then
        train without new pairs.

    Raises
    ------
    TrainingError
        If a loss is not finite.
    """
    device = next(transformer.parameters()).device
    rows = torch.from_numpy(np.array(prototypes, dtype=np.float32)).to(device)
    label_of = torch.from_numpy(np.array(labels, dtype=np.int64)).to(device)
    if len(rows) < 2:
        return Alignment(np.zeros(0, np.int64), np.zeros((0, _latent_dim(transformer)), np.float32), (), ())
    classes = int(label_of.max()) + 1
    optimizer = torch.optim.Adam(transformer.parameters(), lr=rate)
    history: list[tuple[float, float]] = []
    transformer.train()
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(rows), generator=generator).to(device)
        losses = []
        for chosen in torch.split(order, batch):
            if len(chosen) < 2:
                continue
            outputs = transformer(rows[chosen])
            with torch.no_grad():
                means = class_means(transformer(rows), label_of, classes)
            distance = mmd(outputs, _draw(latents, len(chosen), generator, outputs), bandwidths)
            separability = functional.mse_loss(outputs, means[label_of[chosen]])
            optimizer.zero_grad()
            (distance + weight * separability).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(transformer.parameters(), clip)
            optimizer.step()
            losses.append(torch.stack((distance, separability)).detach())
        first, second = torch.stack(losses).mean(0).tolist()
        if not (math.isfinite(first) and math.isfinite(second)):
            raise TrainingError(f"the alignment loss is not finite in epoch {epoch}; lower alignment-rate")
        history.append((first, second))
    with torch.no_grad():
        centroids = class_means(transformer(rows), label_of, classes)
    held = np.unique(to_array(label_of))
    return Alignment(
        labels=held,
        centroids=to_array(centroids)[held],
        mmd=tuple(first for first, _ in history),
        separability=tuple(second for _, second in history),
    )


def _kernel(a: Tensor, b: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    squares = (a.square().sum(1)[:, None] + b.square().sum(1)[None, :] - 2 * a @ b.T).clamp(min=0)
    return torch.stack([torch.exp(squares / (-2 * s)).mean() for s in bandwidths]).sum()


def _draw(latents: LatentSource, count: int, generator: Generator, like: Tensor) -> Tensor:
    drawn = latents(count, generator).to(like)
    if drawn.shape != like.shape:
        raise ValueError(f"latents of shape {tuple(drawn.shape)}, expected {tuple(like.shape)}")
    return drawn


def _latent_dim(transformer: FeatureTransformer) -> int:
    last = transformer[-1]
    assert isinstance(last, nn.Linear)
    return last.out_features
