"""Evaluation at the cloud: quality of a diffusion model's samples, or accuracy of classifiers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from espalier.config.run_settings import RunSettings
from espalier.data.imageset import ImageSet
from espalier.data.spec import open_data
from espalier.errors import ConfigError
from espalier.models.presets import task_of
from espalier.models.sampling import sample
from espalier.seeds import seed_for
from espalier.tasks.diffusion_settings import DiffusionSettings
from espalier.training.scoring import class_accuracy
from espalier_server.evaluation.image_grid import image_grid
from espalier_server.evaluation.quality import Quality
from espalier_server.records.record import AccuracyEntry, Evaluation, ModelScore, Scores

if TYPE_CHECKING:
    import torch
    from torch import nn


def create_evaluator(
    settings: RunSettings,
    image_shape: tuple[int, int, int],
    classes: Sequence[str],
    device: torch.device,
    cache: Path | None = None,
) -> Evaluator | ClassifierEvaluator:
    """Return the evaluator for the model's task, see :class:`Evaluator` and :class:`ClassifierEvaluator`."""
    if task_of(settings.model) == "classification":
        return ClassifierEvaluator(settings, image_shape, classes, device)
    return Evaluator(settings, image_shape, device, cache)


def _open_eval_data(settings: RunSettings, image_shape: tuple[int, int, int]) -> ImageSet:
    """Open the test split of `eval-data`; raises ConfigError if its images do not have the clients' shape."""
    reference = open_data(settings.eval_data, split="test")
    if tuple(reference.shape) != tuple(image_shape):
        raise ConfigError(
            f"eval-data={settings.eval_data} holds images of {reference.shape}, the clients' are {image_shape}; "
            "give data of the clients' shape"
        )
    return reference


class Evaluator:
    """Samples diffusion models and measures the quality of the samples; without `eval-data` it only samples.

    Parameters
    ----------
    settings : RunSettings
        `eval-data`, `features`, `eval-samples`, `sample-steps`, `sample-count` and `seed` are used.
    image_shape : tuple of int
        Channels, height and width of the clients' images.
    device : torch.device
        Where to sample.
    cache : Path, optional
        Folder in which a trained feature network is stored.

    Raises
    ------
    ConfigError
        If the images of `eval-data` have another shape than the clients'.
    """

    def __init__(
        self,
        settings: RunSettings,
        image_shape: tuple[int, int, int],
        device: torch.device,
        cache: Path | None = None,
    ) -> None:
        self.settings, self.device = settings, device
        self.quality: Quality | None = None
        if settings.eval_data:
            reference = _open_eval_data(settings, image_shape)
            self.quality = Quality(
                reference,
                train=open_data(settings.eval_data, split="train"),
                features=settings.of(DiffusionSettings).features,
                seed=seed_for(settings.seed, "cloud", 0, "features"),
                device=device,
                cache=cache,
            )

    def grid(self, model: nn.Module, path: Path) -> None:
        """Sample `sample-count` images, from the same initial noise each time, and write them as a grid."""
        s = self.settings.of(DiffusionSettings)
        images = sample(
            model.to(self.device),
            count=s.sample_count,
            steps=s.sample_steps,
            seed=seed_for(self.settings.seed, "cloud", 0, "grid"),
            settings=s,
        )
        self.save_grid(images, path)

    def save_grid(self, images: torch.Tensor, path: Path) -> None:
        """Write `sample-count` of the images, evenly spaced, as a grid; images [N, C, H, W] in [-1, 1]."""
        count = min(self.settings.of(DiffusionSettings).sample_count, len(images))
        chosen = [i * len(images) // count for i in range(count)]
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid(images[chosen]).save(path)

    def measure(self, models: Mapping[str, nn.Module], window: int, round_: int) -> Evaluation | None:
        """Measure the quality of `eval-samples` samples of the first model; None without `eval-data` or a model.

        Raises
        ------
        DataError
            If the samples cannot be measured, e.g. because they contain NaN.
        """
        model = next(iter(models.values()), None)
        if self.quality is None or model is None:
            return None
        s = self.settings.of(DiffusionSettings)
        images = sample(
            model.to(self.device),
            count=s.eval_samples,
            steps=s.sample_steps,
            seed=seed_for(self.settings.seed, "cloud", 0, "evaluation"),
            settings=s,
        )
        return self.measure_images(images, window, round_)

    def measure_images(self, images: torch.Tensor, window: int, round_: int) -> Evaluation | None:
        """Measure the quality of samples, float32 [N, C, H, W] in [-1, 1]; otherwise like `measure`."""
        if self.quality is None:
            return None
        start = time.monotonic()
        found = self.quality.measure(images)
        return Evaluation(
            window=window,
            round=round_,
            samples=len(images),
            features=found.features,
            frechet=found.frechet,
            inception_score=found.inception_score,
            kid=found.kid,
            **{name: Scores(**dataclasses.asdict(scores)) for name, scores in found.references.items()},
            seconds=time.monotonic() - start,
        )


class ClassifierEvaluator:
    """Measures top-1 accuracy and cross-entropy of classifiers on the test split of `eval-data`.

    Parameters
    ----------
    settings : RunSettings
        `eval-data` is used.
    image_shape : tuple of int
        Channels, height and width of the clients' images.
    classes : sequence of str
        The clients' classes, in label order.
    device : torch.device
        Where to compute.

    Raises
    ------
    ConfigError
        If the images of `eval-data` have another shape or other classes than the clients'.
    """

    def __init__(
        self,
        settings: RunSettings,
        image_shape: tuple[int, int, int],
        classes: Sequence[str],
        device: torch.device,
    ) -> None:
        self.device = device
        self.data: ImageSet | None = None
        if settings.eval_data:
            self.data = _open_eval_data(settings, image_shape)
            if tuple(self.data.classes) != tuple(classes):
                raise ConfigError(
                    f"eval-data={settings.eval_data} has the classes {', '.join(self.data.classes)}, the "
                    f"clients have {', '.join(classes)}; give data with the clients' classes, in their order"
                )

    def grid(self, model: nn.Module, path: Path) -> None:
        """Do nothing: a classifier has no samples."""

    def measure(self, models: Mapping[str, nn.Module], window: int, round_: int) -> AccuracyEntry | None:
        """Measure every model; None without `eval-data` or a model.

        Outputs that are not finite count as wrong predictions and make the model's loss None.

        Raises
        ------
        DataError
            If a model has fewer classes than the data, or an image cannot be read.
        """
        if self.data is None or not models:
            return None
        start = time.monotonic()
        return AccuracyEntry(
            window=window,
            round=round_,
            models={name: self._score(model) for name, model in models.items()},
            samples=len(self.data),
            seconds=time.monotonic() - start,
        )

    def _score(self, model: nn.Module) -> ModelScore:
        assert self.data is not None
        correct, total, loss_sum = class_accuracy(model, self.data, self.device)
        loss = loss_sum / total.sum()
        return ModelScore(
            accuracy=correct.sum() / total.sum(),
            loss=None if loss != loss else loss,
            classes=[c / t if t else None for c, t in zip(correct.tolist(), total.tolist(), strict=True)],
        )
