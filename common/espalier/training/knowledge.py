"""What clients of unlike models learn from each other's class tables: soft labels (FD), prototypes (FedProto).

The terms stand behind the base loss in a sum and use the pass that it makes: a second one would cost as much again
and move running statistics twice. They also make the client's class table; its vectors are the
tensor ``VECTORS`` of the reply (`extra`), its labels and counts come from `table`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from espalier.models.layers import Classifier, Headed
from espalier.tasks.base import measuring
from espalier.training.forward_hooks import Overheard, RunningMean, classifier, single_answer
from espalier.training.objectives import LocalResult, LocalRound, Objective, TrainingError
from espalier.wire import class_table as tables
from espalier.wire.class_table import ClassTable

if TYPE_CHECKING:
    from espalier.data.imageset import ImageSet

#: Prefix of a client's own former table in its state.
KEPT = "soft-label/"


class TableTerm(Objective):
    """A term that makes a class table of the trained network."""

    def table(self) -> ClassTable:
        """Return the client's table; every count is 1. Asked after training, before `end`."""
        raise NotImplementedError

    def extra(self) -> dict[str, np.ndarray]:
        """Return the table's vectors, float32 [classes present, D]."""
        return {tables.VECTORS: self.table().vectors}


class SoftLabels(TableTerm):
    """FD: ``gamma`` times the cross-entropy against the others' mean output for a sample's class.

    Jeong et al. 2018 (arXiv 1811.11479), algorithm 1: outputs are softmax-normalised, and the target of a sample
    of class l is the mean over the *other* clients' mean outputs on their samples of class l. The paper divides by
    M - 1; here it is the number of others who hold the class, and there is no term where there is none (so none in
    the first round). The mean is over all samples of a batch, those without a term included. The client's means
    are over the outputs of the batches it trains on, all through the local phase; the paper takes each output
    behind the update it causes, which is a second pass.

    Parameters
    ----------
    gamma : float
        Weight of the term.
    """

    def __init__(self, gamma: float) -> None:
        self._gamma = gamma
        self._outputs = Overheard()

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Take the others' soft labels; start the client's own."""
        classes = classifier(model, "FD").classes
        device = next(model.parameters()).device
        self._local, self._classes = local, classes
        self._teacher = _others(local, classes, device)
        self._sums = torch.zeros(classes, classes, dtype=torch.float64, device=device)
        self._counts = torch.zeros(classes, dtype=torch.float64, device=device)
        self._mean = RunningMean()
        self._outputs.listen(model)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the term for the batch that the base loss just ran the network on."""
        logs = functional.log_softmax(single_answer(self._outputs.take(), "FD"), dim=1)
        if torch.is_grad_enabled():
            self._sums.index_add_(0, labels, logs.detach().exp().double())
            self._counts += torch.bincount(labels, minlength=self._classes)
        if self._teacher is None:
            return images.new_zeros(())
        # Rows of classes without a soft label are 0, and so is their term.
        value = -(self._teacher[labels] * logs).sum(1).mean()
        self._mean.add(value)
        return self._gamma * value

    def table(self) -> ClassTable:
        """Return the mean outputs by label over the local phase."""
        present = torch.nonzero(self._counts).flatten()
        means = self._sums[present] / self._counts[present, None]
        return ClassTable.of(
            tables.SOFT_LABEL, self._classes, present.cpu().numpy(), means.float().cpu().numpy()
        )

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        """Keep the client's table, which the next round's soft labels will contain."""
        self._outputs.release()
        given = tables.given_arrays(self.table(), self._local.round)
        self._local.state.update({KEPT + name: array for name, array in given.items()})
        return self._mean.report("soft-label-loss")


class Prototypes(TableTerm):
    """FedProto: ``weight`` times the mean squared error between features and their class's global prototype.

    Tan et al., AAAI 2022 (arXiv 2105.00243). Features are what lies under the last layers; their width is the same
    for all clients. The global prototype is the plain mean over the clients that hold the class, oneself
    included; a class without one gives no term. A client's prototypes are its classes' mean features in a pass
    of their own after training, in eval mode.

    Parameters
    ----------
    weight : float
        Weight of the term.
    """

    def __init__(self, weight: float) -> None:
        self._weight = weight
        self._features = Overheard()

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Take the global prototypes."""
        network = classifier(model, "FedProto")
        if not isinstance(network, Headed):
            raise TrainingError(f"FedProto has no features of a {type(model).__name__}; choose another model")
        self._model, self._local, self._made = model, local, None
        self._mean = RunningMean()
        self._global: tuple[Tensor, Tensor] | None = None
        given = tables.given_table(local.aux, tables.PROTOTYPE, network.classes, "the servers")
        if given is not None:
            device = next(model.parameters()).device
            vectors, counts = given.dense()
            self._global = torch.from_numpy(vectors).to(device), torch.from_numpy(counts > 0).to(device)
        self._features.listen(network.projection, inputs=True)

    _made: ClassTable | None = None

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the term for the batch that the base loss just ran the network on."""
        features = cast(Tensor, self._features.take()).float()
        if self._global is None:
            return images.new_zeros(())
        vectors, held = self._global
        if vectors.shape[1] != features.shape[1]:
            raise TrainingError(
                f"this client's features have {features.shape[1]} values, the run's prototypes "
                f"{vectors.shape[1]}; give all clients models of one feature width"
            )
        squares = (features - vectors[labels]).square().mean(1)
        value = torch.where(held[labels], squares, 0.0).mean()
        self._mean.add(value)
        return self._weight * value

    def table(self) -> ClassTable:
        """Return the mean features by class of the network as it is now, measured once a round."""
        if self._made is None:
            network = cast(Classifier, self._model)
            self._made = class_table(tables.PROTOTYPE, network, network.features, self._local)
        return self._made

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        """Report the term."""
        self._features.release()
        return self._mean.report("prototype-loss")


def class_table(
    kind: str,
    model: Classifier,
    answer: Callable[[Tensor], Tensor],
    local: LocalRound,
    finish: Callable[[Tensor], Tensor] = lambda means: means,
) -> ClassTable:
    """Return the mean of what a network answers by class, over all of the client's images.

    Eval mode, no gradient, single precision.

    Parameters
    ----------
    kind : str
        Kind of table.
    model : Classifier
        On its device.
    answer : callable
        From images [B, channels, size, size] to vectors [B, D].
    local : LocalRound
        Gives images and batch size.
    finish : callable
        From means float64 [classes present, D] to the table's vectors.
    """
    data, size = local.require_data(), local.settings.batch_size
    device = next(model.parameters()).device
    labels = torch.from_numpy(np.asarray(data.labels, dtype=np.int64)).to(device)
    counts = torch.bincount(labels, minlength=model.classes)
    sums: Tensor | None = None
    with measuring(model), torch.no_grad():
        for indices, images in _in_order(data, size, device):
            vectors = answer(images).double()
            if sums is None:
                sums = vectors.new_zeros(model.classes, vectors.shape[1])
            sums.index_add_(0, labels[indices], vectors)
        assert sums is not None
        present = torch.nonzero(counts).flatten()
        means = finish(sums[present] / counts[present, None])
    return ClassTable.of(kind, model.classes, present.cpu().numpy(), means.float().cpu().numpy())


def _in_order(data: ImageSet, size: int, device: torch.device) -> Iterable[tuple[Tensor, Tensor]]:
    for start in range(0, len(data), size):
        indices = np.arange(start, min(start + size, len(data)))
        yield torch.from_numpy(indices).to(device), data.fetch(indices).to(device)


def _others(local: LocalRound, classes: int, device: torch.device) -> Tensor | None:
    """Return the others' soft labels [C, C], zeros where there is none; None before there is any table."""
    given = tables.given_table(local.aux, tables.SOFT_LABEL, classes, "the servers")
    if given is None:
        return None
    kept = {n.removeprefix(KEPT): a for n, a in local.state.items() if n.startswith(KEPT)}
    made = int(local.aux.get(tables.ROUND, np.array(local.round - 1)))
    # A client that sat out that round has nothing of its own in the table.
    if kept and int(kept[tables.ROUND]) == made and kept[tables.COUNT].shape == (classes,):
        given = given.without(ClassTable.from_dense(tables.SOFT_LABEL, kept[tables.MEAN], kept[tables.COUNT]))
    return torch.from_numpy(given.dense()[0]).to(device)
