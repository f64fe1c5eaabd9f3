"""Cross-entropy, whole and masked."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from espalier.tasks.classification import CrossEntropy, MaskedCrossEntropy
from espalier.training.objectives import TrainingError
from espalier_client.trainer import train_local
from tests.support.terms import Images, batch, local_round, network


class Fixed(nn.Module):
    """Answers with its own logits, whatever the image."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([logits]))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


def one_image(label: int) -> tuple[Tensor, Tensor, Generator]:
    return torch.zeros(1, 1, 8, 8), torch.tensor([label]), Generator()


def masked(logits: list[float], counts: list[int]) -> tuple[Fixed, MaskedCrossEntropy]:
    model, term = Fixed(logits), MaskedCrossEntropy()
    term.begin(model, local_round(model, labels=np.array(counts)))
    return model, term


def test_masked_logits_are_zero_and_not_minus_infinity() -> None:
    """Two of ten labels with logits 1 and 2; the other eight add e^0 each to the denominator."""
    model, term = masked([1.0, 2.0, *[9.0] * 8], [3, 1, *[0] * 8])
    value = term.loss(model, *one_image(0))
    assert value.item() == pytest.approx(math.log(math.e + math.e**2 + 8) - 1)  # 1.896
    left_out = math.log(math.e + math.e**2) - 1  # 1.313: what minus infinity would give
    assert value.item() - left_out > 0.5


def test_labels_a_client_lacks_get_exactly_no_gradient() -> None:
    model, term = masked([1.0, 2.0, 9.0, -3.0], [3, 1, 0, 0])
    torch.autograd.backward(term.loss(model, *one_image(1)))
    assert model.logits.grad is not None
    total = math.e + math.e**2 + 2
    expected = [math.e / total, math.e**2 / total - 1, 0.0, 0.0]
    assert model.logits.grad[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert model.logits.grad[0, 2:].tolist() == [0.0, 0.0]


def test_rows_of_labels_a_client_lacks_do_not_move_in_training() -> None:
    counts = np.array([3, 3, 0, 0, 0, 0, 0, 0, 0, 0])
    data = Images(6)
    data.labels = np.array([0, 1, 0, 1, 0, 1])
    model = network("cnn")
    local = local_round(model, labels=counts)
    train_local(model, MaskedCrossEntropy(), data, local, seed=1, device="cpu")
    change = (model.classifier.weight - local.received["classifier.weight"]).abs().sum(1)
    assert (change[:2] > 0).all()
    assert (change[2:] == 0).all()


def test_a_client_without_labels_says_so() -> None:
    with pytest.raises(TrainingError, match="label counts are empty"):
        masked([1.0, 2.0], [0, 0])


def test_cross_entropy_sums_over_exits() -> None:
    model, (images, labels) = network("cnn"), batch()
    with torch.no_grad():
        log_p = model(images) - model(images).exp().sum(1, keepdim=True).log()
    value = CrossEntropy().loss(model, images, labels, Generator())
    assert value.item() == pytest.approx(-log_p[range(6), labels].mean().item(), rel=1e-5)
    exits = network("depth-cnn")
    parts = [functional.cross_entropy(z, labels).item() for z in exits(images)]
    assert len(parts) == 3
    assert CrossEntropy().loss(exits, images, labels, Generator()).item() == pytest.approx(sum(parts))
