"""FD: federated distillation (Jeong et al. 2018, arXiv 1811.11479)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.methods.tables import ClassTables

if TYPE_CHECKING:
    from espalier.training.objectives import Objective


class FD(ClassTables):
    """Algorithm 1.

    Clients send the mean of their softmax outputs per label, over the local phase. For a sample of
    label l the loss carries γ times the cross-entropy against the mean of the *other* clients' outputs
    for l: (sum − own) / (count − 1), which the client works out from the table everybody gets.
    """

    name = "fd"
    kind = "soft-label"

    def dimension(self) -> int:
        """Return the number of classes."""
        return self.classes

    def objective(self, round_: int) -> Objective:
        """Return the cross-entropy and the soft labels' term."""
        from espalier.training.knowledge import SoftLabels

        return super().objective(round_) + SoftLabels(self.settings.soft_label_weight)
