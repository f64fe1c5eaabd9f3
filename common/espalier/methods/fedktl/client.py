"""FedKTL at the client: a fixed simplex classifier with an angular margin, prototypes, and the transfer task.

A client's own head h is its last layer, so the output h(f(x)) in R^C of its network is used as the feature: it is
normalised and compared with the C fixed vectors of a simplex equiangular tight frame (ETF), the same for all clients.
So prototypes have C values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from espalier.methods.class_tables import TableTerm, class_table
from espalier.seeds import rng_for, seed_for
from espalier.tasks.base import measuring
from espalier.training.forward_hooks import RunningMean, require_classifier, single_output
from espalier.training.objectives import LocalResult, LocalRound, Objective
from espalier.wire import class_table as tables
from espalier.wire.class_table import ClassTable
from espalier.wire.pairs import PAIRS, Pairs

METHOD = "FedKTL"
#: Margin (radians) and scale of ArcFace (the authors' code).
MARGIN, SCALE = 0.5, 64.0
#: Cosines are clamped to this distance from -1 and 1, where the derivative of the angle is infinite.
CLAMP = 1e-7


class ArcFace(Objective):
    """The base loss: cross-entropy of the ETF's cosines with an angular margin.

    Parameters
    ----------
    margin, scale : float
        m (radians) and s.
    """

    def __init__(self, margin: float = MARGIN, scale: float = SCALE) -> None:
        self._margin, self._scale = margin, scale

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Create the run's ETF."""
        device = next(model.parameters()).device
        self._head = EtfHead.of(require_classifier(model, METHOD).classes, local.settings.seed).to(device)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the cross-entropy of the logits with margin."""
        cosines = self._head(single_output(cast(Any, model)(images), METHOD))
        return functional.cross_entropy(margin_logits(cosines, labels, self._margin, self._scale), labels)


class UnitPrototypes(TableTerm):
    """Sends ``normalize(mean_x normalize(h(f(x))))`` by class, computed in evaluation mode after training."""

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Store the network and the round."""
        self._model, self._local, self._table = require_classifier(model, METHOD), local, None

    _table: ClassTable | None = None

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return 0: the term only measures."""
        return images.new_zeros(())

    def table(self) -> ClassTable:
        """Return the prototypes of the trained network, computed once per round."""
        if self._table is None:
            self._table = class_table(
                tables.UNIT_PROTOTYPE, self._model, self._direction, self._local, functional.normalize
            )
        return self._table

    def _direction(self, images: Tensor) -> Tensor:
        return functional.normalize(single_output(self._model(images), METHOD), dim=1)


class KnowledgeTransfer(Objective):
    """The extra task: ``mu`` times the mean squared error ``(h'(f(x_G)) - Q)^2`` over batch and dimensions.

    Every local minibatch is paired with a minibatch of generated images x_G and their centroids Q, from a repeated
    shuffle of all pairs. The task trains f and h' only. h' is a linear layer from features to the generator's
    latents that starts every round from the same weights: its seed is shared instead of the layer. Before the
    first pairs arrive, and with ``mu = 0``, the term is 0.

    Parameters
    ----------
    mu : float
        Weight of the task.
    """

    def __init__(self, mu: float) -> None:
        self._mu = mu
        self._head: nn.Linear | None = None

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Read the pairs and create h'."""
        network, device = require_classifier(model, METHOD), next(model.parameters()).device
        shape = (network.in_channels, network.sample_size, network.sample_size)
        sent = local.sections.get(PAIRS, {})
        pairs = Pairs.received(sent, shape, "the servers") if self._mu > 0 else None
        self._head, self._mean, self._size = None, RunningMean(), local.settings.batch_size
        self._remaining = torch.empty(0, dtype=torch.int64, device=device)
        if pairs is not None:
            self._images = torch.from_numpy(np.array(pairs.floats())).to(device)
            self._centroids = torch.from_numpy(np.array(pairs.centroids)).to(device)
            with measuring(model), torch.no_grad():
                width = network.features(self._images[:1]).shape[1]
            head = transfer_head(width, self._centroids.shape[1], local.settings.seed)
            self._head = head.to(device)

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of h'."""
        return () if self._head is None else self._head.parameters()

    def separately_clipped_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of h', as in the authors' code: its gradient would dominate a common norm."""
        return self.parameters()

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the task's value for the next generated minibatch; it does not depend on the batch."""
        if self._head is None:
            return images.new_zeros(())
        if not len(self._remaining):
            self._remaining = torch.randperm(len(self._images), generator=generator, device=images.device)
        chosen, self._remaining = self._remaining[: self._size], self._remaining[self._size :]
        output = self._head(require_classifier(model, METHOD).features(self._images[chosen]))
        value = functional.mse_loss(output.float(), self._centroids[chosen])
        self._mean.add(value)
        return self._mu * value

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        """Report the task's mean loss; h' is discarded."""
        self._head = None
        return self._mean.report("transfer-loss")


def margin_logits(cosines: Tensor, labels: Tensor, margin: float = MARGIN, scale: float = SCALE) -> Tensor:
    """Return ArcFace's logits (Deng et al., CVPR 2019): ``scale cos(theta_y + margin)`` for a sample's own class.

    Cosines are clamped, because the derivative of the angle is infinite at -1 and 1. Where theta_y + margin exceeds pi,
    cos would increase again; there ``cos(theta_y) - margin sin(margin)`` is used, which keeps decreasing.

    Parameters
    ----------
    cosines : Tensor
        [B, C].
    labels : Tensor
        int64 [B].
    margin : float
        In radians.
    scale : float
        Factor of all logits.
    """
    own = cosines.gather(1, labels[:, None])
    angle = torch.acos(own.clamp(-1.0 + CLAMP, 1.0 - CLAMP))
    beyond = own - margin * float(np.sin(margin))
    moved = torch.where(angle + margin <= torch.pi, torch.cos(angle + margin), beyond)
    return scale * cosines.scatter(1, labels[:, None], moved)


def transfer_head(width: int, latent_dim: int, run_seed: int) -> nn.Linear:
    """Return the initial h', the same for all clients with features of this width, in every round."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(run_seed, "cloud", 0, "transfer head"))
        return nn.Linear(width, latent_dim)


# --- the classifier ------------------------------------------------------------------------------------


def simplex_etf(classes: int, dimension: int, run_seed: int) -> np.ndarray:
    """Return the run's simplex ETF: unit vectors with pairwise cosines -1/(C-1).

    ``sqrt(C/(C-1)) P (I - 11'/C)`` with orthonormal columns P, K x C, from the QR decomposition of uniform random
    numbers.

    Parameters
    ----------
    classes : int
        C, at least 2.
    dimension : int
        K, at least C.
    run_seed : int
        The run's `seed`. The frame depends on it alone, so it is not sent.

    Returns
    -------
    numpy.ndarray
        float32 [C, K].
    """
    if not 2 <= classes <= dimension:
        raise ValueError(f"a simplex of {classes} vectors in {dimension} dimensions")
    columns, triangle = np.linalg.qr(rng_for(run_seed, "cloud", 0, "etf").random((dimension, classes)))
    # The decomposition does not determine the signs of the columns.
    columns = columns * np.sign(np.diag(triangle))
    frame = np.sqrt(classes / (classes - 1)) * columns @ (np.eye(classes) - 1.0 / classes)
    rows = frame.T / np.linalg.norm(frame.T, axis=1, keepdims=True)
    return np.asarray(rows, dtype=np.float32)


class EtfHead(nn.Module):
    """Maps outputs [B, K] to their cosines [B, C] with the rows of an ETF; the largest is the prediction.

    ``nn.Sequential(model, EtfHead.of(classes, run_seed))`` is a classifier that can be evaluated as any other.

    Parameters
    ----------
    rows : numpy.ndarray
        float32 [C, K], as :func:`simplex_etf` returns them.
    """

    rows: Tensor

    def __init__(self, rows: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("rows", torch.from_numpy(np.array(rows)), persistent=False)

    @classmethod
    def of(cls, classes: int, run_seed: int) -> EtfHead:
        """Return the run's head for networks with one output per class, K = C."""
        return cls(simplex_etf(classes, classes, run_seed))

    def forward(self, outputs: Tensor) -> Tensor:
        """Return the cosines, float32 [B, C]."""
        # In float32 even under autocast, because the loss scales cosines by 64.
        with torch.autocast(outputs.device.type, enabled=False):
            return functional.normalize(outputs.float(), dim=1) @ self.rows.T
