"""SCAFFOLD: stochastic controlled averaging (Karimireddy et al., ICML 2020, arXiv 1910.06378)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.methods.base import CloudState, Inquiry, Method, ServerState, Update
from espalier.methods.tally import Tally

if TYPE_CHECKING:
    from espalier.config.run_config import RunConfig
    from espalier.training.objectives import Objective

SECTION = "control"


class SCAFFOLD(Method):
    """Algorithm 1 with option II.

    Clients step along g(θ) − c_k + c and renew c_k⁺ = c_k − c + (w − y_k)/(Kη). Servers move
    w ← w + η_g · mean Δ_k and c ← c + (1/N) Σ Δc_k, all uniformly weighted, so that c stays the mean
    of all c_k. A client sends y_k and Kη only: Δc_k = −c + (w − y_k)/(Kη) follows from them. Between
    its reports an edge moves its own w and c; its changes of c add up at the cloud.
    """

    name = "scaffold"
    own_optimizer = "sgd"
    own_weighting = "uniform"
    mean_sections = frozenset({SECTION})
    settled = True
    sample_wise = True

    @classmethod
    def contradictions(cls, settings: RunConfig) -> list[str]:
        """Refuse optimisers whose step is not Kη times a mean gradient."""
        faults = []
        if settings.optimizer == "adam":
            faults.append("optimizer: scaffold takes c_k from the length of SGD's steps; set optimizer=sgd")
        if settings.momentum or settings.weight_decay:
            faults.append("momentum: scaffold's c_k would hold momentum and weight decay; set both to 0")
        return faults

    def before_run(self, state: CloudState, ask: Inquiry) -> None:
        """Start from c = 0."""
        state.add_section(SECTION)

    def objective(self, round_: int) -> Objective:
        """Return the task's loss, its gradients corrected by c − c_k."""
        from espalier.training.variates import ControlVariates

        return super().objective(round_) + ControlVariates()

    def contribute(self, tally: Tally, update: Update, server: ServerState) -> None:
        """Add w + η_g Δ_k to the mean, Δc_k / N to the change of c."""
        rate, local = self.settings.server_rate, update.metrics.get("lr-sum", 0.0)
        if not local > 0:
            raise ValueError(f"its sum of step sizes is {local}, so its control variate is unknown")
        control, moved, change = server.section(SECTION), dict(update.arrays), {}
        for name, c in control.items():
            w, y = update.received[name], update.arrays[name]
            moved[name] = w + w.dtype.type(rate) * (y - w)
            change[f"{SECTION}/{name}"] = (w - y) / w.dtype.type(local) - c
        tally.mean(moved, self.weight_of(update))
        tally.sum(change, 1.0 / server.population)

    def step(self, server: ServerState, tally: Tally) -> None:
        """Take the mean, and move c."""
        super().step(server, tally)
        tensors = server.tensors
        server.assign({name: tensors[name] + change for name, change in tally.sums().items()})
