"""What a client minimises: objectives that compose with ``+``, each one term of a local loss.

A term may also act on the gradients (control variates), keep arrays for the client's next round
(``local.state``), use what the server sent beside the model (``local.aux``), bring parameters of its own and
send arrays of its own, so that FedProx, MOON, SCAFFOLD or FedDyn are further terms, each in its module beside
this one. An objective holds what it needs between `begin` and `end` of one round, so one object serves one
training at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from espalier.errors import EspalierError
from espalier.models.architecture import is_reduced
from espalier.models.diffusion import noise_schedule

if TYPE_CHECKING:
    from espalier.config.run_config import RunConfig
    from espalier.data.imageset import ImageSet
    from espalier_proto import espalier_pb2 as pb


class TrainingError(EspalierError):
    """Local training went wrong in a way that a setting can mend."""


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
        Arrays of other sections the server sent, by full name (e.g. "control/conv.weight", SCAFFOLD's c).
    state : mutable mapping of str to numpy.ndarray
        What the client keeps from round to round; written at the end of a round only, arrays are replaced
        and never changed in place, so a round that fails leaves the former state intact.
    name : str
        The client's name; what is random in a term beside its batches derives from it.
    population : int
        Clients in the run, N.
    labels : numpy.ndarray
        The client's label counts, shape (classes,).
    data : ImageSet or None
        The client's own images, for terms that look at all of them at once.
    architecture : pb.ArchitectureSpec or None
        The network's description as received.
    metrics : dict of str to float
        Scalars for the report that no term of the objective gives (e.g. the cluster that was picked).
    peers : mapping of str to pb.ArchitectureSpec
        Other clients' networks whose tensors are in `aux`, by client.
    place : str
        Device to compute on, as torch names it.
    optimizer : str
        "adam" or "sgd" where the method demands one in spite of ``optimizer=auto``; else empty.
    own_state : bool
        Whether the arrays in `state` are the round's alone (read from disk for it, say), so that Adam may go on
        in them instead of in copies. A round that fails leaves them half changed.
    """

    settings: RunConfig
    round: int
    received: Mapping[str, Tensor] = field(default_factory=dict)
    aux: Mapping[str, np.ndarray] = field(default_factory=dict)
    state: MutableMapping[str, np.ndarray] = field(default_factory=dict)
    name: str = ""
    population: int = 1
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    data: ImageSet | None = None
    architecture: pb.ArchitectureSpec | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    peers: Mapping[str, pb.ArchitectureSpec] = field(default_factory=dict)
    place: str = "cpu"
    optimizer: str = ""
    own_state: bool = False

    def require_data(self) -> ImageSet:
        """Return the client's images.

        Raises
        ------
        TrainingError
            There are none.
        """
        if self.data is None or len(self.data) == 0:
            raise TrainingError(f"round {self.round}: this client has no images to train on")
        return self.data


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
    cpu_seconds : float
        Processor time of this process meanwhile, all its threads together.
    metrics : dict of str to float
        Further scalars of the objective's terms; the caller fills them with what `Objective.end` returns.
    """

    steps: int
    samples: int
    loss: float
    lr_sum: float
    seconds: float
    cpu_seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)


class Objective:
    """A term of a local loss. Subclasses override what they need; ``a + b`` is their sum."""

    #: What a batch's value depends on: "images" is a mean over the images of what each gives by itself, "weights"
    #: is nothing but the network, what it received and what it keeps, "batch" is anything else.
    depends_on: ClassVar[Literal["images", "weights", "batch"]] = "batch"

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Prepare for one round; the model is on its device with the received weights."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return parameters of the term's own, trained beside the model's; asked once, after `begin`."""
        return ()

    def apart(self) -> Iterable[nn.Parameter]:
        """Return those of `parameters` whose gradients are clipped by themselves instead of with the model's."""
        return ()

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

    def extra(self) -> dict[str, np.ndarray]:
        """Return the reply's further sections by full name ("head/0.weight"), before `end`."""
        return {}

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        """Finish the round: store state, return scalars for the report.

        Parameters
        ----------
        model : nn.Module
            The trained network.
        result : LocalResult
            What came of the training.
        sent : mapping of str to Tensor
            The model's tensors as the server will read them: a codec may have changed them. What the server
            computes from them too (control variates) must be computed from these.
        """
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

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return every term's own parameters."""
        return tuple(parameter for term in self.terms for parameter in term.parameters())

    def apart(self) -> Iterable[nn.Parameter]:
        """Return what every term wants clipped by itself."""
        return tuple(parameter for term in self.terms for parameter in term.apart())

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

    def extra(self) -> dict[str, np.ndarray]:
        """Return every term's sections."""
        return {name: array for term in self.terms for name, array in term.extra().items()}

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        """Finish every term; their scalars are joined."""
        metrics: dict[str, float] = {}
        for term in self.terms:
            metrics |= term.end(model, result, sent)
        return metrics


class DDPMLoss(Objective):
    """The simple loss of denoising diffusion (Ho et al. 2020, eq. 14).

    ``mean (eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t))^2`` with t uniform over the T steps
    of a linear beta schedule.
    """

    depends_on = "images"

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

    depends_on = "weights"

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

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
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
