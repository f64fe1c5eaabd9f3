"""What classifiers minimise: cross-entropy, whole or over the labels a client has."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from espalier.training.objectives import LocalRound, Objective, TrainingError


def single_precision(answer: Tensor | list[Tensor]) -> list[Tensor]:
    """Return what a classifier answers with in training: logits [B, classes] in float32, one for every exit."""
    return [logits.float() for logits in ([answer] if isinstance(answer, Tensor) else answer)]


def cross_entropy(logits: list[Tensor], labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of a batch, summed over the exits."""
    return torch.stack([functional.cross_entropy(z, labels) for z in logits]).sum()


class CrossEntropy(Objective):
    """Mean cross-entropy of a batch; a network with exits is trained on the sum over its exits."""

    depends_on = "images"

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the cross-entropy."""
        return cross_entropy(single_precision(cast(Any, model)(images)), labels)


class MaskedCrossEntropy(Objective):
    """HeteroFL's loss over the labels a client has (Diao et al., ICLR 2021, section 3; arXiv 2010.01264).

    The logits of labels the client lacks are set to 0, *not* to minus infinity: they get no gradient, but
    each adds e^0 to the denominator, as in the authors' code. Their rows of the output layer move by weight
    decay alone, which is why a client's rows for them are left out of the mean.
    """

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Take the client's label set."""
        if not (local.labels > 0).any():
            raise TrainingError(f"round {local.round}: this client's label counts are empty")
        device = next(model.parameters()).device
        self._lacking = torch.from_numpy(local.labels <= 0).to(device)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the cross-entropy of the masked logits."""
        logits = single_precision(cast(Any, model)(images))
        return cross_entropy([z.masked_fill(self._lacking, 0.0) for z in logits], labels)
