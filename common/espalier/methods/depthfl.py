"""DepthFL: sub-models of different depth that teach one another (Kim et al., ICLR 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.methods.feddyn import FedDyn
from espalier.methods.submodels import SubModels, depth_at

if TYPE_CHECKING:
    from espalier.training.objectives import Objective
    from espalier_proto import espalier_pb2 as pb


class DepthFL(SubModels, FedDyn):
    """Algorithm 1.

    A client of depth d holds the first d stages and their exits. Every exit learns the labels and,
    by KL divergence, from the client's other exits; the drift is corrected by FedDyn, whose h is per
    tensor with as many terms as it has holders. The global network answers with the mean of all exits.
    """

    name = "depthfl"
    own_selection = "uniform"
    families = ("exits",)

    def variant(self, architecture: pb.ArchitectureSpec, level: float) -> pb.ArchitectureSpec:
        """Return the first level·D of D stages and exits."""
        from espalier.models.variants import depth_of, shortened

        return shortened(architecture, depth_at(level, depth_of(architecture)))

    def objective(self, round_: int) -> Objective:
        """Return the exits' cross-entropies and divergences, and the dynamic regulariser."""
        from espalier.training.dynamic import Dynamic
        from espalier.training.exits import ExitDistillation

        return ExitDistillation() + Dynamic(self.settings.dyn_alpha)
