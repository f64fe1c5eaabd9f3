"""What the cloud looks at after a window: samples and their distance to real images, or accuracies."""

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
    """Return the evaluator of the model's task; parameters and errors as below."""
    if task_of(settings.model) == "classification":
        return ClassifierEvaluator(settings, image_shape, classes, device)
    return Evaluator(settings, image_shape, device, cache)


def _reference(settings: RunSettings, image_shape: tuple[int, int, int]) -> ImageSet:
    """Open the test split of `eval-data`, whose images must be as large as the clients'."""
    reference = open_data(settings.eval_data, split="test")
    if tuple(reference.shape) != tuple(image_shape):
        raise ConfigError(
            f"eval-data={settings.eval_data} holds images of {reference.shape}, the clients' are {image_shape}; "
            "name data of the clients' shape"
        )
    return reference


class Evaluator:
    """Of diffusion models: samples and measures; without `eval-data` it only samples.

    Parameters
    ----------
    settings : RunSettings
        `eval-data`, `features`, `eval-samples`, `sample-steps`, `sample-count` and `seed` are used.
    image_shape : tuple of int
        Channels, height and width of the clients' images.
    device : torch.device
        Where to sample.
    cache : Path, optional
        Folder in which a trained feature network is kept.

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
            reference = _reference(settings, image_shape)
            self.quality = Quality(
                reference,
                train=open_data(settings.eval_data, split="train"),
                features=settings.of(DiffusionSettings).features,
                seed=seed_for(settings.seed, "cloud", 0, "features"),
                device=device,
                cache=cache,
            )

    def grid(self, model: nn.Module, path: Path) -> None:
        """Draw `sample-count` images, always from the same noise, so that grids over time compare."""
        s = self.settings.of(DiffusionSettings)
        images = sample(
            model.to(self.device),
            count=s.sample_count,
            steps=s.sample_steps,
            seed=seed_for(self.settings.seed, "cloud", 0, "grid"),
            settings=s,
        )
        self.keep(images, path)

    def keep(self, images: torch.Tensor, path: Path) -> None:
        """Write `sample-count` of the images that somebody drew, spread over all of them, as a grid."""
        count = min(self.settings.of(DiffusionSettings).sample_count, len(images))
        chosen = [i * len(images) // count for i in range(count)]
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid(images[chosen]).save(path)

    def measure(self, models: Mapping[str, nn.Module], window: int, round_: int) -> Evaluation | None:
        """Measure `eval-samples` images of the first model, None without `eval-data` or a model.

        Raises
        ------
        DataError
            If the images cannot be measured, e.g. because the model draws NaN.
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
        """Measure images that somebody drew, float32 [N, C, H, W] in [-1, 1]; else as `measure`."""
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
            **{name: Scores(**dataclasses.asdict(mark)) for name, mark in found.marks.items()},
            seconds=time.monotonic() - start,
        )


class ClassifierEvaluator:
    """Of classifiers: top-1 accuracy and cross-entropy on the test split of `eval-data`.

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
            self.data = _reference(settings, image_shape)
            if tuple(self.data.classes) != tuple(classes):
                raise ConfigError(
                    f"eval-data={settings.eval_data} has the classes {', '.join(self.data.classes)}, the "
                    f"clients have {', '.join(classes)}; name data of the clients' classes, in their order"
                )

    def grid(self, model: nn.Module, path: Path) -> None:
        """Draw nothing: a classifier has no samples."""

    def measure(self, models: Mapping[str, nn.Module], window: int, round_: int) -> AccuracyEntry | None:
        """Score every model; None without `eval-data` or a model.

        A model whose outputs are not finite has wrong answers and a loss of None; it does not keep the others
        from being measured.

        Raises
        ------
        DataError
            If a model knows fewer classes than the data have, or an image cannot be read.
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
