"""FedKTL at the client: a fixed simplex classifier with an angular margin, and what generated pairs teach.

Zhang et al., CVPR 2024 (arXiv 2403.15760). The client's own h is all that lies on its features, so its network's
usual output h(f(x)) in R^C takes the place of a feature: it is brought to length 1 and compared with the C fixed
vectors of a simplex equiangular tight frame (ETF), the same for everybody. So prototypes are C numbers long.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from espalier.seeds import rng_for, seed_for
from espalier.tasks.base import measuring
from espalier.training.forward_hooks import RunningMean, classifier, single_answer
from espalier.training.knowledge import TableTerm, class_table
from espalier.training.objectives import LocalResult, LocalRound, Objective
from espalier.wire import class_table as tables
from espalier.wire.class_table import ClassTable
from espalier.wire.pairs import Pairs

METHOD = "FedKTL"
#: Margin (radians) and scale of ArcFace, the authors'.
MARGIN, SCALE = 0.5, 64.0
#: Cosines are kept this far from -1 and 1, where the derivative of the angle is infinite.
EDGE = 1e-7


def simplex_etf(classes: int, dimension: int, run_seed: int) -> np.ndarray:
    """Return the run's simplex ETF: unit vectors with cosines -1/(C-1) among each other.

    ``sqrt(C/(C-1)) P (I - 11'/C)`` with orthonormal columns P, K x C, from the QR decomposition of uniform numbers.

    Parameters
    ----------
    classes : int
        C, at least 2.
    dimension : int
        K, at least C.
    run_seed : int
        The run's `seed`; everybody who has it has the same frame, so none is sent.

    Returns
    -------
    numpy.ndarray
        float32 [C, K].
    """
    if not 2 <= classes <= dimension:
        raise ValueError(f"a simplex of {classes} vectors in {dimension} dimensions")
    columns, triangle = np.linalg.qr(rng_for(run_seed, "cloud", 0, "etf").random((dimension, classes)))
    # The decomposition leaves the columns' signs open.
    columns = columns * np.sign(np.diag(triangle))
    frame = np.sqrt(classes / (classes - 1)) * columns @ (np.eye(classes) - 1.0 / classes)
    rows = frame.T / np.linalg.norm(frame.T, axis=1, keepdims=True)
    return np.asarray(rows, dtype=np.float32)


class EtfHead(nn.Module):
    """From outputs [B, K] to their cosines [B, C] with the rows of an ETF; the largest is the prediction.

    ``nn.Sequential(model, EtfHead.of(classes, run_seed))`` is a classifier for whoever measures one.

    Parameters
    ----------
    rows : numpy.ndarray
        float32 [C, K], as :func:`simplex_etf` gives them.
    """

    rows: Tensor

    def __init__(self, rows: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("rows", torch.from_numpy(np.array(rows)), persistent=False)

    @classmethod
    def of(cls, classes: int, run_seed: int) -> EtfHead:
        """Return the run's head for networks with one output a class, K = C."""
        return cls(simplex_etf(classes, classes, run_seed))

    def forward(self, outputs: Tensor) -> Tensor:
        """Return cosines."""
        # Single precision also under autocast: the loss scales cosines by 64.
        with torch.autocast(outputs.device.type, enabled=False):
            return functional.normalize(outputs.float(), dim=1) @ self.rows.T


def margin_logits(cosines: Tensor, labels: Tensor, margin: float = MARGIN, scale: float = SCALE) -> Tensor:
    """Return ArcFace's logits (Deng et al., CVPR 2019): ``scale cos(theta_y + margin)`` for a sample's own class.

    Cosines are clamped, or the angle's derivative is infinite. Where theta_y + margin passes pi, cos would rise
    again and pull the sample away; there ``cos(theta_y) - margin sin(margin)`` takes its place, which falls on.

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
    angle = torch.acos(own.clamp(-1.0 + EDGE, 1.0 - EDGE))
    beyond = own - margin * float(np.sin(margin))
    moved = torch.where(angle + margin <= torch.pi, torch.cos(angle + margin), beyond)
    return scale * cosines.scatter(1, labels[:, None], moved)


class ArcFace(Objective):
    """FedKTL's base loss: cross-entropy of the ETF's cosines with an angular margin.

    Parameters
    ----------
    margin, scale : float
        m (radians) and s.
    """

    def __init__(self, margin: float = MARGIN, scale: float = SCALE) -> None:
        self._margin, self._scale = margin, scale

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Make the run's frame."""
        device = next(model.parameters()).device
        self._head = EtfHead.of(classifier(model, METHOD).classes, local.settings.seed).to(device)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the loss."""
        cosines = self._head(single_answer(cast(Any, model)(images), METHOD))
        return functional.cross_entropy(margin_logits(cosines, labels, self._margin, self._scale), labels)


class UnitPrototypes(TableTerm):
    """Sends ``normalize(mean_x normalize(h(f(x))))`` by class, measured after training in eval mode."""

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Remember whose they are."""
        self._model, self._local, self._made = classifier(model, METHOD), local, None

    _made: ClassTable | None = None

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return 0: it only measures."""
        return images.new_zeros(())

    def table(self) -> ClassTable:
        """Return the prototypes of the network as it is now, measured once a round."""
        if self._made is None:
            self._made = class_table(
                tables.UNIT_PROTOTYPE, self._model, self._direction, self._local, functional.normalize
            )
        return self._made

    def _direction(self, images: Tensor) -> Tensor:
        return functional.normalize(single_answer(self._model(images), METHOD), dim=1)


class KnowledgeTransfer(Objective):
    """FedKTL's extra task: ``mu`` times the mean squared error ``(h'(f(x_G)) - Q)^2`` over batch and dimensions.

    One minibatch of generated images x_G with their centroids Q stands beside every local minibatch; they are
    shuffled and gone through again and again. It trains f and h' alone. h' is a linear layer from features to the
    generator's latents that starts every round from the same weights: in place of the layer its seed is shared.
    Without pairs there is no term: before the first ones came, and with ``mu = 0``.

    Parameters
    ----------
    mu : float
        Weight of the task.
    """

    def __init__(self, mu: float) -> None:
        self._mu = mu
        self._head: nn.Linear | None = None

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Take the pairs and make h'."""
        network, device = classifier(model, METHOD), next(model.parameters()).device
        shape = (network.in_channels, network.sample_size, network.sample_size)
        pairs = Pairs.received(local.aux, shape, "the servers") if self._mu > 0 else None
        self._head, self._mean, self._size = None, RunningMean(), local.settings.batch_size
        self._left = torch.empty(0, dtype=torch.int64, device=device)
        if pairs is not None:
            self._images = torch.from_numpy(np.array(pairs.floats())).to(device)
            self._centroids = torch.from_numpy(np.array(pairs.centroids)).to(device)
            with measuring(model), torch.no_grad():
                width = network.features(self._images[:1]).shape[1]
            head = transfer_head(width, self._centroids.shape[1], local.settings.seed)
            self._head = head.to(device)

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return those of h'."""
        return () if self._head is None else self._head.parameters()

    def apart(self) -> Iterable[nn.Parameter]:
        """Return those of h', as the authors do: its gradient would leave the network little of a common norm."""
        return self.parameters()

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the task's value for the next generated minibatch; it does not depend on the batch."""
        if self._head is None:
            return images.new_zeros(())
        if not len(self._left):
            self._left = torch.randperm(len(self._images), generator=generator, device=images.device)
        chosen, self._left = self._left[: self._size], self._left[self._size :]
        answer = self._head(classifier(model, METHOD).features(self._images[chosen]))
        value = functional.mse_loss(answer.float(), self._centroids[chosen])
        self._mean.add(value)
        return self._mu * value

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        """Report the task; h' is thrown away."""
        self._head = None
        return self._mean.report("transfer-loss")


def transfer_head(width: int, latent_dim: int, run_seed: int) -> nn.Linear:
    """Return h', the same for every client with features of this width, in every round."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(run_seed, "cloud", 0, "transfer head"))
        return nn.Linear(width, latent_dim)
