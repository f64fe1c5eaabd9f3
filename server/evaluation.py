"""What the cloud looks at after a window: samples of the global model and their distance to real images."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from common.data.spec import open_data
from common.errors import ConfigError
from common.learning.diffusion import sample
from common.learning.grid import image_grid
from common.learning.quality import Quality
from common.run.config import RunConfig
from common.run.record import Evaluation, Scores
from common.seeds import seed_for

if TYPE_CHECKING:
    import torch
    from torch import nn


class Evaluator:
    """Samples and measures; without `eval-data` it only samples.

    Parameters
    ----------
    settings : RunConfig
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
        settings: RunConfig,
        image_shape: tuple[int, int, int],
        device: torch.device,
        cache: Path | None = None,
    ) -> None:
        self.settings, self.device = settings, device
        self.quality: Quality | None = None
        if settings.eval_data:
            reference = open_data(settings.eval_data, split="test")
            if tuple(reference.shape) != image_shape:
                raise ConfigError(
                    f"eval-data={settings.eval_data} holds images of {reference.shape}, "
                    f"the clients' are {image_shape}"
                )
            self.quality = Quality(
                reference,
                train=open_data(settings.eval_data, split="train"),
                features=settings.features,
                seed=seed_for(settings.seed, "cloud", 0, "features"),
                device=device,
                cache=cache,
            )

    def grid(self, model: nn.Module, path: Path) -> None:
        """Draw `sample-count` images, always from the same noise, so that grids over time compare."""
        s = self.settings
        images = sample(
            model.to(self.device),
            count=s.sample_count,
            steps=s.sample_steps,
            seed=seed_for(s.seed, "cloud", 0, "grid"),
            settings=s,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid(images).save(path)

    def measure(self, model: nn.Module, window: int, round_: int) -> Evaluation | None:
        """Measure `eval-samples` images of the model, None without `eval-data`.

        Raises
        ------
        DataError
            If the images cannot be measured, e.g. because the model draws NaN.
        """
        if self.quality is None:
            return None
        s = self.settings
        start = time.monotonic()
        images = sample(
            model.to(self.device),
            count=s.eval_samples,
            steps=s.sample_steps,
            seed=seed_for(s.seed, "cloud", 0, "evaluation"),
            settings=s,
        )
        found = self.quality.measure(images)
        return Evaluation(
            window=window,
            round=round_,
            samples=s.eval_samples,
            features=found.features,
            frechet=found.frechet,
            inception_score=found.inception_score,
            kid=found.kid,
            **{name: Scores(**dataclasses.asdict(mark)) for name, mark in found.marks.items()},
            seconds=time.monotonic() - start,
        )
