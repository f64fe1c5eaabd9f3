"""Inputs and outputs of methods: a client's update, networks to deploy, inquiries to clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from espalier.methods.selection import Answer
from espalier.wire.payload import Weights
from espalier_proto import espalier_pb2 as pb


@dataclass(frozen=True)
class Update:
    """A client's reply, decoded and with the server's tensor names.

    Attributes
    ----------
    name : str
        The client.
    arrays : dict[str, np.ndarray]
        Trained tensors: whole tensors of the server, or leading slices of them.
    received : dict[str, np.ndarray]
        The same tensors as the client received them.
    samples : int
        Training samples behind it (n_k).
    labels : np.ndarray
        The client's label counts, shape (classes,).
    metrics : Mapping[str, float]
        Further scalars.
    extra : dict[str, np.ndarray]
        Tensors that the server does not have, e.g. "gradient/conv.weight".
    report : pb.ClientReport
        The report of the reply.
    """

    name: str
    arrays: dict[str, np.ndarray]
    received: dict[str, np.ndarray]
    samples: int
    labels: np.ndarray
    metrics: Mapping[str, float] = field(default_factory=dict)
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    report: pb.ClientReport = field(default_factory=pb.ClientReport)


@dataclass(frozen=True)
class Deployed:
    """A network that users would deploy after a window, and that is evaluated.

    Attributes
    ----------
    label : str
        "global", "cluster 1", "width 0.5", …
    architecture : pb.ArchitectureSpec
        The network.
    weights : Weights
        Its tensors, and possibly others.
    clients : tuple of str, optional
        Clients that use it; None: all.
    at_cloud, at_clients : bool
        Where it is evaluated; clients may receive all clusters and choose one.
    """

    label: str
    architecture: pb.ArchitectureSpec
    weights: Weights
    clients: tuple[str, ...] | None = None
    at_cloud: bool = True
    at_clients: bool = True


class Inquiry(Protocol):
    """Sends clients an inquiry about a network; see `WindowStrategy.ask`."""

    def __call__(
        self,
        kind: str,
        architecture: pb.ArchitectureSpec,
        weights: Weights,
        clients: Sequence[str] | None = None,
        keys: Mapping[str, str] | None = None,
    ) -> dict[str, Answer]:
        """Return each client's answer."""
