"""Quality of generated images: Fréchet distance, Inception Score and KID, with reference values."""

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

_MAX_REFERENCE = 10_000
_KID_SUBSETS = 100
_KID_SUBSET_SIZE = 1000
_NO_METRICS = f"measuring quality needs torchmetrics; run: {install_command('cloud')}"


@dataclasses.dataclass(frozen=True)
class Measures:
    """The three quality measures of a set of images."""

    frechet: float
    inception_score: float
    kid: float


@dataclasses.dataclass(frozen=True)
class Scores:
    """The quality measures of a set of generated images, and reference values to compare them with.

    Attributes
    ----------
    frechet : float
        Fréchet distance to the reference images; lower is better.
    inception_score : float
        Inception Score by the feature network's own classes, from 1 to their number; higher is better.
    kid : float
        Kernel distance (KID), mean over subsets; about 0 for equal distributions, lower is better.
    features : str
        Name of the features that all measures are computed on, such as "digits features".
    floor : float
        Fréchet distance of as many training images: the value that real images reach.
    noise : float
        Fréchet distance of as many images of uniform noise: the value of an untrained model.
    gaussian : float
        Fréchet distance of as many draws of a Gaussian fitted to the training pixels: a simple baseline.
    inception_score_real : float
        Inception Score of the reference images.
    references : dict of str to Measures
        All measures of the image sets "floor", "noise" and "gaussian", which the fields above describe.
    samples : int
        Number of generated images.
    caption : str
        Name of `frechet` for captions: "FID" for Inception-v3 features only.
    """

    frechet: float
    inception_score: float
    kid: float
    features: str
    floor: float
    noise: float
    gaussian: float
    inception_score_real: float
    references: dict[str, Measures]
    samples: int
    caption: str

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as a JSON object's content."""
        return dataclasses.asdict(self)


class Quality:
    """Measures the quality of generated images with respect to a reference set.

    Costly preparations, such as training a feature network, are made in the first measurement, so that clients need not
    wait for them before they can train.

    Parameters
    ----------
    reference : ImageSet
        Real images to compare with, ideally not used for training; at most 10,000 of them, drawn by seed, are used.
    train : ImageSet
        Training images, for the feature network, the floor and the Gaussian.
    features : {"classifier", "inception"}
        Feature network, see :func:`espalier_server.evaluation.features.open_features`.
    seed : int
        Seed of the feature network and of all random draws.
    device : torch.device or str
        Where the feature network computes.
    cache : Path, optional
        Folder in which trained classifiers are stored.

    Raises
    ------
    ConfigError
        The features are unknown, or torchmetrics is not installed.
    DataError
        The sets differ in shape or are too small, or the feature network is not available.
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
        self._references: dict[int, dict[str, Measures]] = {}

    @cached_property
    def _real(self) -> tuple[torch.Tensor, float]:
        """Features and Inception Score of the reference images."""
        data = self._reference
        chosen = _random_images(data, _MAX_REFERENCE, rng_for(self._seed, data.name, 0, "quality/reference"))
        features, logits = self.network.extract(chosen)
        return features, inception_score(logits, seed=self._draw_seed("score"))

    def measure(self, images: torch.Tensor) -> Scores:
        """Measure the quality of generated images.

        Parameters
        ----------
        images : torch.Tensor
            Shape [N, C, H, W], values in [-1, 1]; rounded to 8 bits, since the real images are.

        Returns
        -------
        Scores
            The measures, with reference values for the same N.

        Raises
        ------
        DataError
            There are fewer than 2 images, or they have another shape than the reference or values that are not
            finite.
        """
        if tuple(images.shape[1:]) != self._train.shape:
            raise DataError(f"generated images are {tuple(images.shape[1:])}, the data {self._train.shape}")
        if len(images) < 2:
            raise DataError(f"quality needs at least 2 generated images, not {len(images)}")
        if not torch.isfinite(images).all():
            raise DataError("a generated image has a value that is not finite")
        features, logits = self.network.extract(to_float(to_uint8(images.detach().cpu())))
        references = self._references_for(len(images))
        found = self._measures(features, logits)
        return Scores(
            frechet=found.frechet,
            inception_score=found.inception_score,
            kid=found.kid,
            features=self.network.name,
            floor=references["floor"].frechet,
            noise=references["noise"].frechet,
            gaussian=references["gaussian"].frechet,
            inception_score_real=self._real[1],
            references=references,
            samples=len(images),
            caption="FID" if self.network.is_inception else f"Fréchet distance ({self.network.name})",
        )

    def _measures(self, features: torch.Tensor, logits: torch.Tensor) -> Measures:
        return Measures(
            frechet=frechet_distance(self._real[0], features),
            inception_score=inception_score(logits, seed=self._draw_seed("score")),
            kid=kernel_distance(self._real[0], features, seed=self._draw_seed("kid")),
        )

    def _references_for(self, count: int) -> dict[str, Measures]:
        """Return the reference values for `count` images; the Fréchet distance depends on their number."""
        if count not in self._references:
            rng = rng_for(self._seed, self._train.name, 0, f"quality/marks/{count}")
            floor = _random_images(self._train, count, rng)
            noise = torch.from_numpy(rng.integers(0, 256, (count, *self._train.shape), np.uint8))
            gaussian = gaussian_images(_random_images(self._train, 5000, rng), count, rng)
            sets = {"floor": floor, "noise": to_float(noise), "gaussian": to_float(to_uint8(gaussian))}
            self._references[count] = {
                name: self._measures(*self.network.extract(images)) for name, images in sets.items()
            }
        return self._references[count]

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
    # Standard normal combinations of the centred images have their covariance, without forming its matrix.
    mix = torch.from_numpy(rng.standard_normal((count, len(flat)), np.float32)) / max(1, len(flat) - 1) ** 0.5
    draws: torch.Tensor = mix @ (flat - mean) + mean
    return draws.clamp_(-1, 1).reshape(count, *images.shape[1:])


def frechet_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Return the Fréchet distance of the Gaussians fitted to two sets of features [N, D] and [M, D].

    d^2 = |mu_1 - mu_2|^2 + Tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) (Dowson and Landau, 1982; Heusel et al., 2017).
    """
    metric = _metrics().fid.FrechetInceptionDistance(feature=_PrecomputedFeatures(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return max(0.0, float(metric.compute()))  # rounding errors may make it negative for equal sets


def kernel_distance(real: torch.Tensor, generated: torch.Tensor, *, seed: int) -> float:
    """Return the kernel distance (KID; Binkowski et al., 2018) of two sets of features [N, D] and [M, D].

    Cubic polynomial kernel; mean over 100 random subsets of 1,000 features, or of all if there are fewer.
    """
    size = min(_KID_SUBSET_SIZE, len(real), len(generated))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # about the memory that features take: they are in memory already
        metric = _metrics().kid.KernelInceptionDistance(
            feature=_PrecomputedFeatures(real.shape[1]), subsets=_KID_SUBSETS, subset_size=size
        )
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, _ = metric.compute()
    return float(mean)


def inception_score(logits: torch.Tensor, *, seed: int) -> float:
    """Return the Inception Score (Salimans et al., 2016) of class logits [N, K].

    exp E KL(p(y|x) || p(y)), mean over up to 10 splits of at least 500 images: smaller splits bias it downwards.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about memory, and the deviation of a single split
        metric = _metrics().inception.InceptionScore(
            feature=_PrecomputedFeatures(logits.shape[1]), splits=max(1, min(10, len(logits) // 500))
        )
        metric.update(logits.double())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mean, _ = metric.compute()
    return float(mean)


class _PrecomputedFeatures(nn.Module):
    """The identity, in place of the feature network that torchmetrics expects."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.num_features = dims

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def _metrics() -> Any:
    import_torchvision()  # torchmetrics imports torchvision if it is installed
    try:
        import torchmetrics.image.fid
        import torchmetrics.image.inception
        import torchmetrics.image.kid
    except ImportError as error:
        raise ConfigError(_NO_METRICS) from error
    return torchmetrics.image


def _random_images(data: ImageSet, count: int, rng: np.random.Generator) -> torch.Tensor:
    """Return `count` random images, or all if there are fewer; [count, C, H, W] in [-1, 1]."""
    chosen = np.sort(rng.permutation(len(data))[:count])
    return torch.cat([data.fetch(part) for part in np.array_split(chosen, len(chosen) // 256 + 1)])
