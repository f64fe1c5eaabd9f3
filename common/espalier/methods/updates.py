"""Inputs and outputs of a method: clients' updates, deployed networks and inquiries to clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from espalier.methods.selection import Answer
from espalier.wire.payload import Weights
from espalier.wire.sections import MODEL, Payload, SectionId
from espalier_proto import espalier_pb2 as pb


@dataclass(frozen=True)
class Update:
    """A client's decoded reply, with its tensors mapped to the server's sections.

    Attributes
    ----------
    name : str
        Name of the client.
    sections : dict[SectionId, dict[str, np.ndarray]]
        The trained tensors: whole tensors of the server, or leading slices of them.
    received : dict[SectionId, dict[str, np.ndarray]]
        The same tensors as they were sent to it.
    samples : int
        The client's training samples (n_k).
    labels : np.ndarray
        The client's label counts, shape (classes,).
    metrics : Mapping[str, float]
        Other scalars.
    extra : dict[SectionId, dict[str, np.ndarray]]
        Sections that the server does not have, e.g. a gradient.
    report : pb.ClientReport
        The client report of the reply.
    """

    name: str
    sections: dict[SectionId, dict[str, np.ndarray]]
    received: dict[SectionId, dict[str, np.ndarray]]
    samples: int
    labels: np.ndarray
    metrics: Mapping[str, float] = field(default_factory=dict)
    extra: dict[SectionId, dict[str, np.ndarray]] = field(default_factory=dict)
    report: pb.ClientReport = field(default_factory=pb.ClientReport)


@dataclass(frozen=True)
class Deployed:
    """A network to evaluate after a window, which users would deploy.

    Attributes
    ----------
    label : str
        "global", "cluster 1", "width 0.5", …
    architecture : pb.ArchitectureSpec
        The network.
    weights : Weights
        Tensors that include those of the network.
    clients : tuple of str, optional
        Clients for which it is intended; None: all.
    at_cloud, at_clients : bool
        Whether the cloud and the clients can evaluate it.
    sections : mapping of SectionId to Weights
        Other sections that clients need to evaluate it.
    """

    label: str
    architecture: pb.ArchitectureSpec
    weights: Weights
    clients: tuple[str, ...] | None = None
    at_cloud: bool = True
    at_clients: bool = True
    sections: Mapping[SectionId, Weights] = field(default_factory=dict)

    @property
    def payload(self) -> Payload:
        """The payload that is sent to clients to evaluate it."""
        model = {MODEL: self.weights} if self.weights.layout.tensors else {}
        return Payload({**model, **self.sections})


class Inquiry(Protocol):
    """Sends an inquiry about a network to clients; see `WindowAggregator.ask`."""

    def __call__(
        self,
        kind: str,
        architecture: pb.ArchitectureSpec,
        payload: Payload,
        clients: Sequence[str] | None = None,
        keys: Mapping[str, str] | None = None,
    ) -> dict[str, Answer]:
        """Return each client's answer."""
