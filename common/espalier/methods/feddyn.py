"""FedDyn: federated learning with dynamic regularisation (Acar et al., ICLR 2021, arXiv 2111.04263)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from espalier.methods.base import CloudState, Inquiry, Method, ServerState, Update
from espalier.methods.tally import Tally

if TYPE_CHECKING:
    from espalier.training.objectives import Objective

SECTION = "dyn"


class FedDyn(Method):
    """Algorithm 1.

    Clients minimise F_k(θ) − ⟨g_k, θ⟩ + α/2 ‖θ − w‖² and renew g_k ← g_k − α(θ_k − w). Servers keep
    h ← h − (α/N) Σ_S (θ_k − w), which stays the mean of all g_k, and send w = mean_S θ_k − h/α. A
    coordinate that nobody held keeps its value (for sub-models this is DepthFL's rule); statistics
    and counters are averaged without h. Between its reports an edge moves its own w and h.
    """

    name = "feddyn"
    own_optimizer = "sgd"
    own_selection = "bernoulli"
    own_weighting = "uniform"
    server_sections = frozenset({SECTION})
    mean_sections = frozenset({SECTION})
    settled = True
    sample_wise = True

    def before_run(self, state: CloudState, ask: Inquiry) -> None:
        """Start from h = 0."""
        state.add_section(SECTION)

    def objective(self, round_: int) -> Objective:
        """Return the task's loss and the dynamic regulariser."""
        from espalier.training.dynamic import Dynamic

        return super().objective(round_) + Dynamic(self.settings.dyn_alpha)

    def contribute(self, tally: Tally, update: Update, server: ServerState) -> None:
        """Add θ_k to the mean, −(α/N)(θ_k − w) to the change of h."""
        tally.mean(update.arrays, self.weight_of(update))
        drift = {
            f"{SECTION}/{name}": update.arrays[name] - update.received[name]
            for name in update.arrays
            if f"{SECTION}/{name}" in server.tensors
        }
        tally.sum(drift, -self.settings.dyn_alpha / server.population)

    def step(self, server: ServerState, tally: Tally) -> None:
        """Move h, then w."""
        before, alpha = server.tensors, self.settings.dyn_alpha
        h = {name: before[name] + change for name, change in tally.sums().items()}
        means = tally.means(before)
        for name, mean in means.items():
            if (key := f"{SECTION}/{name}") in h:
                means[name] = np.where(tally.held(name), mean - h[key] / mean.dtype.type(alpha), before[name])
        server.assign(h | means)
