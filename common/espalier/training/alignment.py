"""FedKTL at the cloud: the feature transformer F from clients' prototypes to a generator's latents.

Zhang et al., CVPR 2024 (arXiv 2403.15760). F is trained so that its outputs are distributed as the generator's
latents (MMD) and those of one class lie together (class separability). A class's centroid is the mean of F over its
prototypes: the paper's intent. The authors' code learns a table that only tracks that mean.
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

#: Squared bandwidths of the sum of Gaussian kernels, the authors'.
BANDWIDTHS = (10.0, 15.0, 20.0, 50.0)

LatentSource = Callable[[int, Generator], Tensor]
"""A generator's own latents: from a count and a torch generator to float32 [count, H]."""


class FeatureTransformer(nn.Sequential):
    """F: ``Linear(K, K), BatchNorm1d, ReLU, Linear(K, H)``.

    Its batch normalisation has no running statistics: F is only ever applied to the prototypes it is trained on,
    all of them at once for the centroids.

    Parameters
    ----------
    dimension : int
        K, length of a prototype.
    latent_dim : int
        H, length of a latent.
    run_seed : int
        The initial weights depend on it alone.
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
        """Return copies of its tensors, which the cloud keeps from round to round."""
        return {name: to_array(tensor).copy() for name, tensor in self.state_dict().items()}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take the tensors that `arrays` gave."""
        load_arrays(self, arrays)


@dataclass(frozen=True, eq=False)
class Alignment:
    """What came of an alignment.

    Attributes
    ----------
    labels : numpy.ndarray
        int64 [m], ascending: the classes somebody holds.
    centroids : numpy.ndarray
        float32 [m, H], Q: where the generator makes each class's image.
    mmd, separability : tuple of float
        The two losses by epoch, means over its steps; the second one without its weight.
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
        The s of the kernels. They suit latents whose squared distances are of their size: far beyond, as for
        thousands of standard normal dimensions, every kernel between two different points is 0, and so is the
        gradient.
    """
    return _kernel(a, a, bandwidths) + _kernel(b, b, bandwidths) - 2 * _kernel(a, b, bandwidths)


def class_means(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the means [C, D] of values [n, D] by label int64 [n]; 0 for a class without any."""
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

    The loss of a batch is ``MMD(F(P), w) + weight * MSE(F(P), Q_y)`` with as many fresh latents w as the batch has
    rows. Q is the mean of F over *all* rows of a class under the weights of this step, taken as a constant: with
    all rows in one batch its gradient would vanish anyway, and a Q of an epoch ago would hold F back. Adam
    starts anew with every call. A last batch of a single row, which batch normalisation cannot take, is left
    out of its epoch.

    Parameters
    ----------
    transformer : FeatureTransformer
        On its device.
    prototypes : numpy.ndarray
        float32 [n, K], one row per client and class it has.
    labels : numpy.ndarray
        int64 [n].
    latents : callable
        Draws from the generator's latents.
    generator : Generator
        Order and latents; on the CPU, so that every device draws the same.
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
        Without any centroid where there are fewer than two rows: there is nothing to normalise over, so clients
        go on without pairs.

    Raises
    ------
    TrainingError
        A loss is not finite.
    """
    device = next(transformer.parameters()).device
    rows = torch.from_numpy(np.array(prototypes, dtype=np.float32)).to(device)
    marks = torch.from_numpy(np.array(labels, dtype=np.int64)).to(device)
    if len(rows) < 2:
        return Alignment(np.zeros(0, np.int64), np.zeros((0, _latent_dim(transformer)), np.float32), (), ())
    classes = int(marks.max()) + 1
    optimizer = torch.optim.Adam(transformer.parameters(), lr=rate)
    history: list[tuple[float, float]] = []
    transformer.train()
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(rows), generator=generator).to(device)
        losses = []
        for chosen in torch.split(order, batch):
            if len(chosen) < 2:
                continue
            answers = transformer(rows[chosen])
            with torch.no_grad():
                means = class_means(transformer(rows), marks, classes)
            distance = mmd(answers, _draw(latents, len(chosen), generator, answers), bandwidths)
            separability = functional.mse_loss(answers, means[marks[chosen]])
            optimizer.zero_grad()
            (distance + weight * separability).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(transformer.parameters(), clip)
            optimizer.step()
            losses.append(torch.stack((distance, separability)).detach())
        first, second = torch.stack(losses).mean(0).tolist()
        if not (math.isfinite(first) and math.isfinite(second)):
            raise TrainingError(f"the alignment's loss is not finite in epoch {epoch}; lower alignment-rate")
        history.append((first, second))
    with torch.no_grad():
        centroids = class_means(transformer(rows), marks, classes)
    held = np.unique(to_array(marks))
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
        raise ValueError(f"latents of shape {tuple(drawn.shape)}, {tuple(like.shape)} are wanted")
    return drawn


def _latent_dim(transformer: FeatureTransformer) -> int:
    last = transformer[-1]
    assert isinstance(last, nn.Linear)
    return last.out_features
