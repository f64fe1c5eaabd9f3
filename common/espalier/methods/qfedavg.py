"""q-FedAvg: fair resource allocation (Li et al., ICLR 2020, arXiv 1905.10497)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from espalier.config.fields import NonNegative, SettingsGroup
from espalier.methods.aggregate import Aggregate
from espalier.methods.base import Method, ServerState, Update
from espalier.methods.selection import SelectionSettings
from espalier.tasks.local_metrics import local_loss
from espalier.training.objectives import LocalResult, LocalRound, Objective
from espalier.wire.sections import MODEL

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from espalier.config.run_settings import RunSettings


class QFedAvg(Method):
    """Algorithm 2, for the objective Σ_k p_k/(q+1) F_k^{q+1}.

    With F_k the loss at the received w and L = 1/η, the paper has Δ_k = F_k^q L(w − y_k),
    h_k = q F_k^{q−1} ‖L(w − y_k)‖² + L F_k^q and w ← w − ΣΔ_k / Σh_k. That is the mean of w − Δ_k/h_k
    with weights h_k, which is how it is aggregated here: it merges from edges to the cloud, and the weight of an
    edge's window is its Σh_k. Clients are sampled ∝ n_k, so their mean is not weighted again.
    """

    class Settings(SettingsGroup):
        """How strongly large losses weigh."""

        fairness_q: NonNegative = Field(default=1.0, description="exponent q of the losses; 0: a plain mean")

    name = "qfedavg"
    uses = (Settings,)
    own_selection = "proportional"
    own_optimizer = "sgd"
    extra_disclosure = "its loss at the received model, by which it is weighted"

    @classmethod
    def contradictions(cls, settings: RunSettings) -> list[str]:
        """Refuse weighting by samples, because the losses are the weights, and optimisers other than SGD."""
        faults = []
        if settings.of(SelectionSettings).weighting == "samples":
            faults.append("weighting: q-FedAvg weighs clients by their loss; leave it at auto")
        if settings.optimizer == "adam":
            faults.append("optimizer: q-FedAvg's L is 1 over SGD's step size; set optimizer=sgd")
        return faults

    # --- client --------------------------------------------------------------------------------------

    def objective(self, round_: int) -> Objective:
        """Return the task's loss; F_k(w) is reported, too."""
        return super().objective(round_) + ReceivedLoss()

    # --- edge and cloud ------------------------------------------------------------------------------

    def contribute(self, aggregate: Aggregate, update: Update, server: ServerState) -> None:
        """Add w − Δ_k/h_k with weight h_k; running statistics and counters without the correction."""
        q, loss = self.settings.of(QFedAvg.Settings).fairness_q, update.metrics.get("received-loss", 0.0)
        if not loss > 0:
            raise ValueError(f"its loss at the received model is {loss}; q-FedAvg needs a positive one")
        local = update.metrics.get("lr-sum", 0.0)
        if not local > 0:
            raise ValueError(f"its sum of step sizes is {local}, so q-FedAvg's L is unknown")
        lipschitz = update.metrics["steps"] / local  # L = 1/η
        sent, received = update.sections[MODEL], update.received[MODEL]
        trained = [n for n in sent if n not in server.buffers]
        square = sum(float(np.sum(np.square(sent[n] - received[n], dtype=np.float64))) for n in trained)
        # h_k = L F^q (1 + q L ‖w − y‖² / F), so Δ_k/h_k = (w − y) / (1 + q L ‖w − y‖² / F).
        damping = 1.0 + q * lipschitz * square / loss
        fair = dict(sent)
        for name in trained:
            w = received[name]
            fair[name] = w + (sent[name] - w) / w.dtype.type(damping)
        aggregate.mean({MODEL: fair}, lipschitz * loss**q * damping)


class ReceivedLoss(Objective):
    """Reports F_k(w), the loss at the received model over all local data, as "received-loss".

    This is the loss *before* training, not the mean loss during training. As in the authors' code 1e-10 is added,
    so that a power of it is defined. It has no gradient.
    """

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Measure F_k(w)."""
        self._value = 1e-10 + local_loss(model, local, "received loss")

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return 0: the term only measures."""
        return images.new_zeros(())

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        """Report the loss."""
        return {"received-loss": self._value}
