"""The contract of local training: objectives that compose with ``+``, and what a round gives and returns.

A method's local loss is a sum of terms (FedProx, MOON, SCAFFOLD and FedDyn each add one to the task's loss). A
term may also change gradients (control variates), keep arrays for the client's next round (`LocalRound.state`),
read what the server sent with the model (`LocalRound.sections`), train parameters of its own and send arrays of its
own. An objective holds what it needs between `begin` and `end` of one round, so one object serves one training at
a time.

The module imports without torch, because the modules of methods, which edges import, define objectives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from espalier.errors import EspalierError
from espalier.wire.sections import SectionId

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from espalier.config.run_settings import RunSettings
    from espalier.data.imageset import ImageSet
    from espalier_proto import espalier_pb2 as pb


class TrainingError(EspalierError):
    """Local training failed; the message names the setting to change."""


@dataclass
class LocalRound:
    """The input of a client's training in one round.

    Attributes
    ----------
    settings : RunSettings
        The run's configuration, from the plan.
    round : int
        Edge round, counted from 1 over the run.
    received : mapping of str to Tensor
        The model's tensors as received, by name; never written to.
    sections : mapping of SectionId to mapping of str to numpy.ndarray
        Sections besides the model that the server sent (e.g. SCAFFOLD's c), by tensor name.
    state : mutable mapping of str to numpy.ndarray
        The client's state between rounds. It is written at the end of a round only, and arrays are replaced
        rather than changed in place, so a round that fails leaves the state as it was.
    name : str
        The client's name; the randomness of a term derives from it.
    population : int
        Clients in the run, N.
    labels : numpy.ndarray
        The client's label counts, shape (classes,).
    data : ImageSet or None
        The client's own images, for terms that need all of them at once.
    architecture : pb.ArchitectureSpec or None
        The network's description as received.
    metrics : dict of str to float
        Scalars of the report that come from no term of the objective (e.g. the chosen cluster).
    peers : mapping of str to pb.ArchitectureSpec
        Other clients' networks whose tensors are in `sections`, by client.
    place : str
        Device to compute on, as torch names it.
    optimizer : str
        "adam" or "sgd" if the method requires one and ``optimizer=auto``; otherwise empty.
    own_state : bool
        Whether the arrays in `state` belong to this round alone (e.g. were read from disk for it), so that Adam may
        update them in place instead of copying them. A round that fails leaves them partly changed.
    """

    settings: RunSettings
    round: int
    received: Mapping[str, Tensor] = field(default_factory=dict)
    sections: Mapping[SectionId, Mapping[str, np.ndarray]] = field(default_factory=dict)
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
    """The result of a client's training in one round; the trained weights are in the model.

    Attributes
    ----------
    steps : int
        Optimiser steps taken.
    samples : int
        Training samples behind the update.
    loss : float
        Mean objective over the steps, weighted by the images of each.
    lr_sum : float
        Sum of the learning rates of the steps (K * eta of SCAFFOLD, also with a schedule).
    seconds : float
        Wall time of the training.
    cpu_seconds : float
        CPU time of this process during the training, over all threads.
    metrics : dict of str to float
        Further scalars, filled by the caller with what `Objective.end` returns.
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

    #: What the value of a batch depends on: "images" is a mean of independent per-image losses, "weights" is a function
    #: of the weights, the received arrays and the state only, "batch" is anything else.
    depends_on: ClassVar[Literal["images", "weights", "batch"]] = "batch"

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Prepare for one round; the model is on its device with the received weights."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the term's own parameters, trained with the model's; called once, after `begin`."""
        return ()

    def separately_clipped_parameters(self) -> Iterable[nn.Parameter]:
        """Return those of `parameters` whose gradient norm is clipped separately from the model's."""
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

    def extra(self) -> dict[SectionId, dict[str, np.ndarray]]:
        """Return the reply's sections besides the model; called before `end`."""
        return {}

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        """Finish the round: store state, return scalars for the report.

        Parameters
        ----------
        model : nn.Module
            The trained network.
        result : LocalResult
            The result of the training.
        sent : mapping of str to Tensor
            The model's tensors as the server decodes them, possibly changed by a codec. State that the server
            recomputes from them (control variates) must be computed from these.
        """
        return {}

    def __add__(self, other: Objective) -> Objective:
        return Sum((*_terms(self), *_terms(other)))


class Sum(Objective):
    """The sum of several terms; their methods are called in order."""

    def __init__(self, terms: Iterable[Objective]) -> None:
        self.terms = tuple(terms)

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Prepare every term."""
        for term in self.terms:
            term.begin(model, local)

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return every term's own parameters."""
        return tuple(parameter for term in self.terms for parameter in term.parameters())

    def separately_clipped_parameters(self) -> Iterable[nn.Parameter]:
        """Return every term's separately clipped parameters."""
        return tuple(p for term in self.terms for p in term.separately_clipped_parameters())

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

    def extra(self) -> dict[SectionId, dict[str, np.ndarray]]:
        """Return every term's sections."""
        return {section: arrays for term in self.terms for section, arrays in term.extra().items()}

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        """Finish every term; their scalars are joined."""
        metrics: dict[str, float] = {}
        for term in self.terms:
            metrics |= term.end(model, result, sent)
        return metrics


def _terms(objective: Objective) -> tuple[Objective, ...]:
    return objective.terms if isinstance(objective, Sum) else (objective,)
