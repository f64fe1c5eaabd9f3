"""Losses of classifiers: cross-entropy over all classes or over the labels that a client holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from espalier import lazy
from espalier.training.objectives import LocalRound, Objective, TrainingError

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn
    from torch.nn import functional
else:
    torch, functional = lazy.load("torch"), lazy.load("torch.nn.functional")


def single_precision(answer: Tensor | list[Tensor]) -> list[Tensor]:
    """Return a classifier's outputs in training: a list of float32 logits [B, classes], one per exit."""
    return [logits.float() for logits in ([answer] if isinstance(answer, torch.Tensor) else answer)]


def cross_entropy(logits: list[Tensor], labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of a batch, summed over the exits."""
    return torch.stack([functional.cross_entropy(z, labels) for z in logits]).sum()


class CrossEntropy(Objective):
    """Mean cross-entropy of a batch; for a network with exits, the sum over its exits."""

    depends_on = "images"

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the cross-entropy."""
        return cross_entropy(single_precision(cast(Any, model)(images)), labels)


class MaskedCrossEntropy(Objective):
    """HeteroFL's loss over the labels that a client holds (Diao et al., ICLR 2021, section 3; arXiv 2010.01264).

    The logits of absent labels are set to 0, *not* to minus infinity: they get no gradient, but each adds e^0 to
    the denominator, as in the authors' code. Only weight decay changes their rows of the output layer, so those
    rows are excluded from the mean.
    """

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Read the client's label set."""
        if not (local.labels > 0).any():
            raise TrainingError(f"round {local.round}: this client's label counts are empty")
        device = next(model.parameters()).device
        self._absent = torch.from_numpy(local.labels <= 0).to(device)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the cross-entropy of the masked logits."""
        logits = single_precision(cast(Any, model)(images))
        return cross_entropy([z.masked_fill(self._absent, 0.0) for z in logits], labels)
