"""What a client minimises: objectives that compose with ``+``, each one term of a local loss.

A term may also act on the gradients (control variates), keep arrays for the client's next round
(``local.state``) and use what the server sent beside the model (``local.aux``), so that FedProx, MOON,
SCAFFOLD or FedDyn are further terms. An objective holds what it needs between `begin` and `end` of one round,
so one object serves one training at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from common.learning.diffusion import noise_schedule
from common.models.architecture import is_reduced

if TYPE_CHECKING:
    from common.run.config import RunConfig


@dataclass
class LocalRound:
    """What a client knows when it trains in one round.

    Attributes
    ----------
    settings : RunConfig
        The run's configuration, from the plan.
    round : int
        Edge round, counted from 1 over the run.
    received : mapping of str to Tensor
        The model's tensors as received, by name; never written to.
    aux : mapping of str to numpy.ndarray
        Further arrays the server sent (e.g. SCAFFOLD's c), by name.
    state : mutable mapping of str to numpy.ndarray
        What the client keeps from round to round; written at the end of a round only, arrays are replaced
        and never changed in place, so a round that fails leaves the former state intact.
    """

    settings: RunConfig
    round: int
    received: Mapping[str, Tensor] = field(default_factory=dict)
    aux: Mapping[str, np.ndarray] = field(default_factory=dict)
    state: MutableMapping[str, np.ndarray] = field(default_factory=dict)


@dataclass
class LocalResult:
    """What came of a client's training in one round; the trained weights are in the model.

    Attributes
    ----------
    steps : int
        Optimiser steps taken.
    samples : int
        Training samples the update stands for.
    loss : float
        Mean objective over the steps, each weighted by its images.
    lr_sum : float
        Sum of the learning rates of the steps (what SCAFFOLD's K * eta is with a schedule).
    seconds : float
        Wall time of the training.
    metrics : dict of str to float
        Further scalars of the objective's terms.
    """

    steps: int
    samples: int
    loss: float
    lr_sum: float
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)


class Objective:
    """A term of a local loss. Subclasses override what they need; ``a + b`` is their sum."""

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Prepare for one round; the model is on its device with the received weights."""

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the term's value for a batch.

        Parameters
        ----------
        model : nn.Module
            The network in training.
        images : Tensor
            float32 [B, C, H, W] in [-1, 1].
        labels : Tensor
            int64 [B].
        generator : Generator
            Source of all randomness of the term, on the images' device.

        Returns
        -------
        Tensor
            A scalar to minimise.
        """
        raise NotImplementedError

    def after_backward(self, model: nn.Module) -> None:
        """Change the gradients before they are clipped and applied."""

    def end(self, model: nn.Module, result: LocalResult) -> dict[str, float]:
        """Finish the round: store state, return scalars for the report."""
        return {}

    def __add__(self, other: Objective) -> Objective:
        return Sum((*_terms(self), *_terms(other)))


class Sum(Objective):
    """The sum of several terms; they begin, act on gradients and end in their order."""

    def __init__(self, terms: Iterable[Objective]) -> None:
        self.terms = tuple(terms)

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Prepare every term."""
        for term in self.terms:
            term.begin(model, local)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the sum of the terms' values."""
        first, *rest = self.terms
        total = first.loss(model, images, labels, generator)
        for term in rest:
            total = total + term.loss(model, images, labels, generator)
        return total

    def after_backward(self, model: nn.Module) -> None:
        """Let every term change the gradients."""
        for term in self.terms:
            term.after_backward(model)

    def end(self, model: nn.Module, result: LocalResult) -> dict[str, float]:
        """Finish every term; their scalars are joined."""
        metrics: dict[str, float] = {}
        for term in self.terms:
            metrics |= term.end(model, result)
        return metrics


class DDPMLoss(Objective):
    """The simple loss of denoising diffusion (Ho et al. 2020, eq. 14).

    ``mean (eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t))^2`` with t uniform over the T steps
    of a linear beta schedule.
    """

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Build the noise schedule of the run's settings."""
        self._schedule = noise_schedule(local.settings)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the mean squared error of the predicted noise."""
        device = images.device
        steps: int = self._schedule.config.num_train_timesteps
        noise = torch.randn(images.shape, generator=generator, device=device, dtype=images.dtype)
        times = torch.randint(steps, (images.shape[0],), generator=generator, device=device)
        noisy = self._schedule.add_noise(images, noise, times)
        predicted: Tensor = cast(Any, model)(noisy, times, return_dict=False)[0]
        return functional.mse_loss(predicted.float(), noise)


class GroupNormPenalty(Objective):
    """FedPhD's sparse phase: ``weight * sum_W ||W||_2`` (methods/fedphd.md section 2).

    The sum runs over every trainable parameter whose name contains "weight" (GroupNorm scales included); the
    norm is of the whole tensor. It prepares the network for pruning, so it vanishes where the network is
    already pruned.

    Parameters
    ----------
    weight : float or None
        Factor of the penalty; None takes the run's ``sparse-weight``.
    """

    def __init__(self, weight: float | None = None) -> None:
        self._given = weight
        self._factor = 0.0
        self._weights: list[Tensor] = []

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Collect the weights; none where the factor is 0 or the network is pruned."""
        self._factor = local.settings.sparse_weight if self._given is None else self._given
        self._weights = []
        if self._factor > 0 and not is_reduced(model):
            named = model.named_parameters()
            self._weights = [p for name, p in named if "weight" in name and p.requires_grad]

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the penalty; it does not depend on the batch."""
        if not self._weights:
            return images.new_zeros(())
        return self._factor * self._norms().sum()

    def end(self, model: nn.Module, result: LocalResult) -> dict[str, float]:
        """Report the penalty's last value."""
        if not self._weights:
            return {}
        with torch.no_grad():
            value = float(self._factor * self._norms().sum())
        self._weights = []
        return {"sparse-penalty": value} if math.isfinite(value) else {}

    def _norms(self) -> Tensor:
        # One fused call: a U-Net has some hundred weights, and a tiny one is trained step by step on a CPU.
        return torch.stack(torch._foreach_norm(self._weights))


def _terms(objective: Objective) -> tuple[Objective, ...]:
    return objective.terms if isinstance(objective, Sum) else (objective,)
