"""Accuracies: counted by hand, the same whatever the batches, and measured at the cloud for several models."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from espalier.data.imageset import TensorImages
from espalier.data.spec import open_data
from espalier.errors import ConfigError, DataError
from espalier.methods.run_config import RunConfig
from espalier.training.scoring import accuracy, class_accuracy
from espalier_server.evaluation.evaluator import ClassifierEvaluator, Evaluator, create_evaluator
from espalier_server.records.record import AccuracyEntry

CPU = torch.device("cpu")
DIGITS = tuple("0123456789")


class Told(nn.Module):
    """Logits by the image's only pixel: row `value` of a table."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.register_buffer("table", torch.tensor(table))
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append(self.training)
        values = ((images[:, 0, 0, 0] + 1) * 127.5).round().long()
        return torch.as_tensor(self.table)[values]


def five() -> TensorImages:
    pixels = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1)
    return TensorImages(pixels, np.array([0, 1, 1, 0, 1]), ("a", "b", "c"), "toy")


LOGITS: list[list[float]] = [[2.0, 0, 0], [0, 1, 0], [3, 0, 0], [0, 0, 1], [0, 5, 0]]  # right: images 0, 1, 4


@pytest.mark.parametrize("batch", [1, 2, 3, 99])
def test_counts_and_loss_by_hand(batch: int) -> None:
    model = Told(LOGITS).train()
    score = accuracy(model, five(), CPU, batch)
    log_sums = [math.log(sum(math.exp(x) for x in row)) for row in LOGITS]
    expected = sum(s - row[label] for s, row, label in zip(log_sums, LOGITS, [0, 1, 1, 0, 1], strict=True))
    assert (score.correct, score.total) == (3, 5)
    assert score.loss_sum == pytest.approx(expected, rel=1e-6)
    assert not any(model.modes)  # scored in evaluation mode …
    assert model.training  # … and handed back as it was
    correct, total, _ = class_accuracy(model, five(), CPU, batch)
    assert (correct.tolist(), total.tolist()) == ([1, 2, 0], [2, 3, 0])


def test_no_images_are_no_error() -> None:
    assert accuracy(Told(LOGITS), five().subset(np.array([], np.int64)), CPU) == (0, 0, 0.0)


def test_what_is_not_finite_is_wrong() -> None:
    score = accuracy(Told([[2.0, float("nan"), 0], [0, float("inf"), 0], *LOGITS[2:]]), five(), CPU, 2)
    assert (score.correct, score.total) == (1, 5)
    assert math.isnan(score.loss_sum)


def test_a_model_of_fewer_classes_is_refused() -> None:
    with pytest.raises(DataError, match="'toy' have 3 classes, the model 2"):
        accuracy(Told([row[:2] for row in LOGITS]), five(), CPU)


# --- at the cloud ----------------------------------------------------------------------------------------


class Nearest(nn.Module):
    """Says the class of the nearest mean image; `shift` permutes its answers."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        data = open_data("digits")
        images = data.fetch(np.arange(len(data))).flatten(1)
        self.means = torch.stack([images[torch.from_numpy(data.labels == c)].mean(0) for c in range(10)])
        self.shift = shift

    def forward(self, images: Tensor) -> Tensor:
        return -torch.cdist(images.flatten(1), self.means).roll(self.shift, 1)


def test_several_models_are_measured_on_the_test_split() -> None:
    settings = RunConfig(model="cnn", method="fedavg", eval_data="digits")
    evaluator = create_evaluator(settings, (1, 8, 8), DIGITS, CPU)
    assert isinstance(evaluator, ClassifierEvaluator)
    models = {"cluster 0": Nearest(), "cluster 1": Nearest(shift=1), "broken": Told([[math.nan] * 10] * 256)}
    entry = evaluator.measure(models, 3, 15)
    assert entry is not None
    assert (entry.window, entry.round, entry.samples, list(entry.models)) == (3, 15, 360, list(models))
    # Independently: the test images, the nearest mean by plain numpy.
    test = open_data("digits", split="test")
    images = test.fetch(np.arange(len(test))).flatten(1).numpy()
    means = models["cluster 0"].means.numpy()  # type: ignore[operator]
    said = ((images[:, None] - means[None]) ** 2).sum(2).argmin(1)
    right, shifted, broken = entry.models.values()
    assert right.accuracy == pytest.approx((said == test.labels).mean())
    assert right.classes == pytest.approx([(said[test.labels == c] == c).mean() for c in range(10)])
    assert shifted.accuracy == pytest.approx(((said + 1) % 10 == test.labels).mean())
    assert (broken.accuracy, broken.loss) == (0.0, None)
    assert right.loss is not None
    assert shifted.loss is not None
    assert shifted.loss > right.loss
    assert (entry.mean, entry.worst10) == (None, None)


def test_without_eval_data_or_models_nothing_is_measured(tmp_path: Path) -> None:
    blind = ClassifierEvaluator(RunConfig(model="cnn", method="fedavg"), (1, 8, 8), DIGITS, CPU)
    assert blind.measure({"global": Nearest()}, 1, 1) is None
    blind.grid(Nearest(), tmp_path / "grid.png")
    assert not any(tmp_path.iterdir())
    seeing = ClassifierEvaluator(
        RunConfig(model="cnn", method="fedavg", eval_data="digits"), (1, 8, 8), DIGITS, CPU
    )
    assert seeing.measure({}, 1, 1) is None
    assert isinstance(create_evaluator(RunConfig(), (1, 8, 8), DIGITS, CPU), Evaluator)


def test_eval_data_must_fit_the_clients() -> None:
    settings = RunConfig(model="cnn", method="fedavg", eval_data="digits")
    with pytest.raises(ConfigError, match="clients' shape"):
        ClassifierEvaluator(settings, (3, 8, 8), DIGITS, CPU)
    with pytest.raises(ConfigError, match="clients' classes"):
        ClassifierEvaluator(settings, (1, 8, 8), ("cats", "dogs"), CPU)


def test_worst_tenth_by_hand() -> None:
    def entry(*accuracies: float | None) -> AccuracyEntry:
        return AccuracyEntry(window=1, round=1, clients={f"c{i}": a for i, a in enumerate(accuracies)})

    assert entry(0.5, 0.25, 1.0).worst10 == 0.25  # a tenth of three is none: one at least
    assert entry(0.5, 0.25, 1.0).mean == pytest.approx(1.75 / 3)
    twenty = [i / 20 for i in range(20)]
    assert entry(*twenty).worst10 == pytest.approx(0.025)  # the mean of 0 and 0.05
    assert entry(0.5, None, math.nan).mean == 0.5
