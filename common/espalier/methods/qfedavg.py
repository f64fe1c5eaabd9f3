"""q-FedAvg: fair resource allocation (Li et al., ICLR 2020, arXiv 1905.10497)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from espalier.methods.base import Method, ServerState, Update
from espalier.methods.tally import Tally

if TYPE_CHECKING:
    from espalier.config.run_config import RunConfig
    from espalier.training.objectives import Objective


class QFedAvg(Method):
    """Algorithm 2, for the objective Σ_k p_k/(q+1) F_k^{q+1}.

    With F_k the loss at the received w and L = 1/η, the paper has Δ_k = F_k^q L(w − y_k),
    h_k = q F_k^{q−1} ‖L(w − y_k)‖² + L F_k^q and w ← w − ΣΔ_k / Σh_k. That is the mean of w − Δ_k/h_k
    with weights h_k, which is how it is added up here: it merges from edges to the cloud, and an edge's
    window weighs as much as its Σh_k. Clients are drawn ∝ n_k, so a mean over them is not weighted again.
    """

    name = "qfedavg"
    own_selection = "proportional"
    own_optimizer = "sgd"
    tells = "its loss at the received model, by which it is weighted"

    @classmethod
    def contradictions(cls, settings: RunConfig) -> list[str]:
        """Refuse a weighting: the clients' losses are the weights."""
        faults = []
        if settings.weighting == "samples":
            faults.append("weighting: q-FedAvg weighs clients by their loss; leave it at auto")
        if settings.optimizer == "adam":
            faults.append("optimizer: q-FedAvg's L is 1 over SGD's step size; set optimizer=sgd")
        return faults

    def objective(self, round_: int) -> Objective:
        """Return the task's loss; F_k(w) is reported beside it."""
        from espalier.training.received_model import ReceivedLoss

        return super().objective(round_) + ReceivedLoss()

    def contribute(self, tally: Tally, update: Update, server: ServerState) -> None:
        """Add w − Δ_k/h_k with weight h_k; statistics and counters as they are."""
        q, loss = self.settings.fairness_q, update.metrics.get("received-loss", 0.0)
        if not loss > 0:
            raise ValueError(f"its loss at the received model is {loss}; q-FedAvg needs a positive one")
        local = update.metrics.get("lr-sum", 0.0)
        if not local > 0:
            raise ValueError(f"its sum of step sizes is {local}, so q-FedAvg's L is unknown")
        lipschitz = update.metrics["steps"] / local  # L = 1/η
        trained = [n for n in update.arrays if n not in server.buffers]
        square = sum(
            float(np.sum(np.square(update.arrays[n] - update.received[n], dtype=np.float64))) for n in trained
        )
        # h_k = L F^q (1 + q L ‖w − y‖² / F), so Δ_k/h_k = (w − y) / (1 + q L ‖w − y‖² / F).
        damping = 1.0 + q * lipschitz * square / loss
        fair = dict(update.arrays)
        for name in trained:
            w = update.received[name]
            fair[name] = w + (update.arrays[name] - w) / w.dtype.type(damping)
        tally.mean(fair, lipschitz * loss**q * damping)
