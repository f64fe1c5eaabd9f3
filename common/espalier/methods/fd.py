"""FD: federated distillation (Jeong et al. 2018, arXiv 1811.11479)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from espalier import lazy
from espalier.config.fields import NonNegative, SettingsGroup
from espalier.methods.class_tables import ClassTables, TableTerm
from espalier.methods.own_models import OwnModelSettings
from espalier.training.forward_hooks import ForwardCapture, RunningMean, require_classifier, single_output
from espalier.training.objectives import LocalResult, LocalRound, Objective
from espalier.wire import class_table as tables
from espalier.wire.class_table import ClassTable

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn
    from torch.nn import functional
else:
    torch, functional = lazy.load("torch"), lazy.load("torch.nn.functional")

#: Prefix of a client's own previous table in its state.
STATE = "soft-label/table/"


class FD(ClassTables):
    """Algorithm 1.

    Clients send the mean of their softmax outputs per label over the local phase. For a sample of label l the
    local loss adds γ times the cross-entropy against the mean of the *other* clients' outputs for l, (sum − own) /
    (count − 1), which the client computes from the common table.
    """

    class Settings(SettingsGroup):
        """The weight of the averaged outputs."""

        soft_label_weight: NonNegative = Field(default=1.0, description="weight gamma of the soft labels")

    name = "fd"
    uses = (Settings, OwnModelSettings)
    kind = "soft-label"

    def dimension(self) -> int:
        """Return the number of classes."""
        return self.classes

    def objective(self, round_: int) -> Objective:
        """Return the cross-entropy and the distillation from the soft labels."""
        return super().objective(round_) + SoftLabelDistillation(
            self.settings.of(FD.Settings).soft_label_weight
        )


class SoftLabelDistillation(TableTerm):
    """``gamma`` times the cross-entropy against the other clients' mean output for a sample's class.

    Algorithm 1: outputs are softmax-normalised, and the target of a sample of class l is the mean over the *other*
    clients' mean outputs on their samples of class l. The paper divides by M - 1; here the divisor is the number
    of other clients with the class, and without any (e.g. in the first round) the term is 0. The mean is over all
    samples of a batch, including those without a term. The client's means are over the outputs of its training
    batches in the local phase; the paper computes each output after the update, which needs a second pass.

    The term uses the forward pass of the base loss: a second one would cost as much again and update running statistics
    twice. So it comes after the base loss in the sum.

    Parameters
    ----------
    gamma : float
        Weight of the term.
    """

    def __init__(self, gamma: float) -> None:
        self._gamma = gamma
        self._outputs = ForwardCapture()

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Read the other clients' soft labels; reset the client's own."""
        classes = require_classifier(model, "FD").classes
        device = next(model.parameters()).device
        self._local, self._classes = local, classes
        self._teacher = _other_clients(local, classes, device)
        self._sums = torch.zeros(classes, classes, dtype=torch.float64, device=device)
        self._counts = torch.zeros(classes, dtype=torch.float64, device=device)
        self._mean = RunningMean()
        self._outputs.attach(model)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the term for the batch that the base loss just ran the network on."""
        logs = functional.log_softmax(single_output(self._outputs.take(), "FD"), dim=1)
        if torch.is_grad_enabled():
            self._sums.index_add_(0, labels, logs.detach().exp().double())
            self._counts += torch.bincount(labels, minlength=self._classes)
        if self._teacher is None:
            return images.new_zeros(())
        # Rows of classes without a soft label are 0, so their term is 0.
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
        """Store the client's table, which the next round's soft labels will include."""
        self._outputs.release()
        given = tables.given_arrays(self.table(), self._local.round)
        self._local.state.update({STATE + name: array for name, array in given.items()})
        return self._mean.report("soft-label-loss")


def _other_clients(local: LocalRound, classes: int, device: torch.device) -> Tensor | None:
    """Return the other clients' soft labels [C, C], zeros for absent classes; None before the first table."""
    common = local.sections.get(tables.TABLE, {})
    given = tables.given_table(common, tables.SOFT_LABEL, classes, "the servers")
    if given is None:
        return None
    own = {n.removeprefix(STATE): a for n, a in local.state.items() if n.startswith(STATE)}
    table_round = int(common.get(tables.ROUND, np.array(local.round - 1)))
    # The table includes nothing of a client that did not participate in its round.
    if own and int(own[tables.ROUND]) == table_round and own[tables.COUNT].shape == (classes,):
        given = given.without(ClassTable.from_dense(tables.SOFT_LABEL, own[tables.MEAN], own[tables.COUNT]))
    return torch.from_numpy(given.dense()[0]).to(device)
