"""FedProx: FedAvg whose clients stay near the model they got (Li et al. 2020, arXiv 1812.06127)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.methods.base import Method

if TYPE_CHECKING:
    from espalier.training.objectives import Objective


class FedProx(Method):
    """Algorithm 2: clients minimise F_k(θ) + μ/2 ‖θ − w‖², servers average by samples."""

    name = "fedprox"
    sample_wise = True

    def objective(self, round_: int) -> Objective:
        """Return the task's loss and the proximal term."""
        from espalier.training.proximal import Proximal

        return super().objective(round_) + Proximal(self.settings.prox_mu)
