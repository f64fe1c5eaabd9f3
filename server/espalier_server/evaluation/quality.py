"""How good generated images are: Fréchet distance, Inception Score and KID beside a floor and a ceiling."""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from espalier.data.imageset import ImageSet, to_float, to_uint8
from espalier.distribution import install_command
from espalier.errors import ConfigError, DataError
from espalier.seeds import rng_for, seed_for
from espalier.torchvision_shim import import_torchvision
from espalier_server.evaluation.features import Features, open_features

_MAX_REAL = 10_000
_KID_SUBSETS = 100
_KID_SUBSET_SIZE = 1000
_NO_METRICS = f"measuring quality needs torchmetrics; run: {install_command('cloud')}"


@dataclasses.dataclass(frozen=True)
class Mark:
    """The three figures of a set of images that others are held against."""

    frechet: float
    inception_score: float
    kid: float


@dataclasses.dataclass(frozen=True)
class Scores:
    """What was measured of a set of generated images, and what the figures are to be held against.

    Attributes
    ----------
    frechet : float
        Fréchet distance to the reference images; lower is better.
    inception_score : float
        Inception Score by the feature network's own classes, from 1 to their number; higher is better.
    kid : float
        Kernel distance (KID), mean over subsets; about 0 for images like the reference, lower is better.
    features : str
        The features all figures are in, such as "digits features".
    floor : float
        Fréchet distance of as many training images to the reference: what real images reach.
    noise : float
        Fréchet distance of as many images of uniform noise: the mark of a model that learnt nothing.
    gaussian : float
        Fréchet distance of as many draws of a Gaussian fitted to the training pixels: the least to beat.
    inception_score_real : float
        Inception Score of the reference images.
    marks : dict of str to Mark
        All three figures of "floor", "noise" and "gaussian", the images of the fields above.
    samples : int
        Number of generated images.
    caption : str
        Name of `frechet` for a figure: "FID" for Inception-v3 features only.
    """

    frechet: float
    inception_score: float
    kid: float
    features: str
    floor: float
    noise: float
    gaussian: float
    inception_score_real: float
    marks: dict[str, Mark]
    samples: int
    caption: str

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as a JSON object's content."""
        return dataclasses.asdict(self)


class Quality:
    """Measures generated images against a reference set.

    What takes long, training a feature network above all, is put off to the first measurement: by then clients
    have trained, who else would wait for it.

    Parameters
    ----------
    reference : ImageSet
        Real images to compare with, best held out of training; of more than 10,000, a seeded choice is used.
    train : ImageSet
        Training images: they train the feature network and give the floor and the Gaussian.
    features : {"classifier", "inception"}
        Feature network, see :func:`espalier_server.evaluation.features.open_features`.
    seed : int
        Seed of the feature network and of every draw.
    device : torch.device or str
        Where the feature network computes.
    cache : Path, optional
        Folder that keeps trained classifiers.

    Raises
    ------
    ConfigError
        The features are unknown, or torchmetrics is not installed.
    DataError
        The sets differ in shape or are too small, or the feature network cannot be had.
    """

    def __init__(
        self,
        reference: ImageSet,
        *,
        train: ImageSet,
        features: str = "classifier",
        seed: int,
        device: torch.device | str = "cpu",
        cache: Path | None = None,
    ) -> None:
        if importlib.util.find_spec("torchmetrics") is None:
            raise ConfigError(_NO_METRICS)
        for role, data in (("reference", reference), ("training", train)):
            if len(data) < 2:
                raise DataError(f"quality needs at least 2 {role} images of {data.name!r}, not {len(data)}")
        if reference.shape != train.shape:
            raise DataError(f"reference images are {reference.shape} but training images {train.shape}")
        self._seed = seed
        self._train = train
        self.network: Features = open_features(features, train, seed=seed, device=device, cache=cache)
        self._reference = reference
        self._marks: dict[int, dict[str, Mark]] = {}

    @cached_property
    def _real(self) -> tuple[torch.Tensor, float]:
        """Features and Inception Score of the reference images."""
        data = self._reference
        chosen = _choice(data, _MAX_REAL, rng_for(self._seed, data.name, 0, "quality/reference"))
        features, logits = self.network.extract(chosen)
        return features, inception_score(logits, seed=self._draw_seed("score"))

    def measure(self, images: torch.Tensor) -> Scores:
        """Score generated images.

        Parameters
        ----------
        images : torch.Tensor
            Shape [N, C, H, W], values in [-1, 1]; rounded to 8 bits as an image file would, since the real
            images are.

        Returns
        -------
        Scores
            The figures, with floor and ceilings for the same N.

        Raises
        ------
        DataError
            The images are fewer than 2, of another shape than the reference or not finite.
        """
        if tuple(images.shape[1:]) != self._train.shape:
            raise DataError(f"generated images are {tuple(images.shape[1:])}, the data {self._train.shape}")
        if len(images) < 2:
            raise DataError(f"quality needs at least 2 generated images, not {len(images)}")
        if not torch.isfinite(images).all():
            raise DataError("a generated image holds a value that is not finite")
        features, logits = self.network.extract(to_float(to_uint8(images.detach().cpu())))
        marks = self._marks_for(len(images))
        found = self._figures(features, logits)
        return Scores(
            frechet=found.frechet,
            inception_score=found.inception_score,
            kid=found.kid,
            features=self.network.name,
            floor=marks["floor"].frechet,
            noise=marks["noise"].frechet,
            gaussian=marks["gaussian"].frechet,
            inception_score_real=self._real[1],
            marks=marks,
            samples=len(images),
            caption="FID" if self.network.is_inception else f"Fréchet distance ({self.network.name})",
        )

    def _figures(self, features: torch.Tensor, logits: torch.Tensor) -> Mark:
        return Mark(
            frechet=frechet_distance(self._real[0], features),
            inception_score=inception_score(logits, seed=self._draw_seed("score")),
            kid=kernel_distance(self._real[0], features, seed=self._draw_seed("kid")),
        )

    def _marks_for(self, count: int) -> dict[str, Mark]:
        """Return floor, noise and Gaussian for a number of images: few samples raise a Fréchet distance."""
        if count not in self._marks:
            rng = rng_for(self._seed, self._train.name, 0, f"quality/marks/{count}")
            floor = _choice(self._train, count, rng)
            noise = torch.from_numpy(rng.integers(0, 256, (count, *self._train.shape), np.uint8))
            gaussian = gaussian_images(_choice(self._train, 5000, rng), count, rng)
            sets = {"floor": floor, "noise": to_float(noise), "gaussian": to_float(to_uint8(gaussian))}
            self._marks[count] = {
                name: self._figures(*self.network.extract(images)) for name, images in sets.items()
            }
        return self._marks[count]

    def _draw_seed(self, purpose: str) -> int:
        return seed_for(self._seed, self._train.name, 0, f"quality/{purpose}")


def gaussian_images(images: torch.Tensor, count: int, rng: np.random.Generator) -> torch.Tensor:
    """Draw from the Gaussian with the mean and covariance of the pixels of `images`, clipped to [-1, 1].

    Parameters
    ----------
    images : torch.Tensor
        Shape [N, C, H, W].
    count : int
        Number of draws.
    rng : numpy.random.Generator
        Source of the draws.

    Returns
    -------
    torch.Tensor
        float32 [count, C, H, W] in [-1, 1].
    """
    flat = images.reshape(len(images), -1)
    mean = flat.mean(dim=0)
    # A standard normal mix of the centred images has their covariance, which itself is never formed.
    mix = torch.from_numpy(rng.standard_normal((count, len(flat)), np.float32)) / max(1, len(flat) - 1) ** 0.5
    draws: torch.Tensor = mix @ (flat - mean) + mean
    return draws.clamp_(-1, 1).reshape(count, *images.shape[1:])


def frechet_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Return the Fréchet distance of the Gaussians fitted to two sets of features [N, D] and [M, D].

    d^2 = |mu_1 - mu_2|^2 + Tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) (Dowson and Landau, 1982; Heusel et al., 2017).
    """
    metric = _metrics().fid.FrechetInceptionDistance(feature=_Given(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return max(0.0, float(metric.compute()))  # rounding can leave equal sets just below zero


def kernel_distance(real: torch.Tensor, generated: torch.Tensor, *, seed: int) -> float:
    """Return the kernel distance (KID; Binkowski et al., 2018) of two sets of features [N, D] and [M, D].

    Cubic polynomial kernel, mean over 100 subsets of 1,000, or of all where there are fewer.
    """
    size = min(_KID_SUBSET_SIZE, len(real), len(generated))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that features are kept in memory: they already are
        metric = _metrics().kid.KernelInceptionDistance(
            feature=_Given(real.shape[1]), subsets=_KID_SUBSETS, subset_size=size
        )
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, _ = metric.compute()
    return float(mean)


def inception_score(logits: torch.Tensor, *, seed: int) -> float:
    """Return the Inception Score (Salimans et al., 2016) of class logits [N, K].

    exp E KL(p(y|x) || p(y)), mean over up to 10 splits of at least 500: smaller ones bias it down.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about memory, and the deviation of a single split
        metric = _metrics().inception.InceptionScore(
            feature=_Given(logits.shape[1]), splits=max(1, min(10, len(logits) // 500))
        )
        metric.update(logits.double())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mean, _ = metric.compute()
    return float(mean)


class _Given(nn.Module):
    """Stands where torchmetrics expects a feature network: the features are computed already."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.num_features = dims

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def _metrics() -> Any:
    import_torchvision()  # torchmetrics imports it where it is installed
    try:
        import torchmetrics.image.fid
        import torchmetrics.image.inception
        import torchmetrics.image.kid
    except ImportError as error:
        raise ConfigError(_NO_METRICS) from error
    return torchmetrics.image


def _choice(data: ImageSet, count: int, rng: np.random.Generator) -> torch.Tensor:
    """Fetch `count` images at random, or all where there are no more."""
    chosen = np.sort(rng.permutation(len(data))[:count])
    return torch.cat([data.fetch(part) for part in np.array_split(chosen, len(chosen) // 256 + 1)])
