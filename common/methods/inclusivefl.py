"""InclusiveFL: tiers of different depth (Liu et al., KDD 2022, arXiv 2202.08036)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from common.methods.submodels import SubModels
from proto import espalier_pb2 as pb

if TYPE_CHECKING:
    pass


class InclusiveFL(SubModels):
    """Sections 3.2 and 3.3, with local training instead of single gradients.

    Tier t trains the first L_t stages and one exit. A stage that several tiers share is averaged over
    all of them by samples. What each tier has for itself, and the servers hold once per tier as
    "tier T/…", is its last stage and its exit. The last stage of a tier also follows the tier above
    (momentum distillation): its change becomes (1 − β) Δ_last + β · mean of Δ of the next tier's
    stages L_t … L_{t+1}, as far as their shapes are its own.

    The authors' code never applies the momentum term; the formula is the paper's.
    """

    name = "inclusivefl"

    def variant(self, architecture: pb.ArchitectureSpec, level: float) -> pb.ArchitectureSpec:
        """Return the network of a tier: its stages, and the exit of the last one."""
        from common.models.variants import depth_of, shortened

        return shortened(architecture, math.ceil(level * depth_of(architecture) - 1e-9))
