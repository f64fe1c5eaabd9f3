"""FjORD: ordered dropout (Horváth, Laskaridis et al., NeurIPS 2021, arXiv 2102.13451)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from espalier.methods.base import CloudState, Deployed, Inquiry
from espalier.methods.levels import parse_levels
from espalier.methods.submodels import SubModels, sliced
from espalier.wire.payload import Layout, TensorSpec, Weights
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from espalier.training.objectives import Objective


class FjORD(SubModels):
    """Algorithm 1.

    A client of width p_max trains, batch by batch, the leading slice of a width p ≤ p_max drawn
    uniformly, and the smaller one learns from the larger. Servers average every coordinate by samples
    over the clients whose p_max holds it. Batch normalisation keeps statistics for each width, as
    "pWIDTH/…", which only clients that train the width move.
    """

    name = "fjord"

    def variant(self, architecture: pb.ArchitectureSpec, level: float) -> pb.ArchitectureSpec:
        """Return the network of a width."""
        from espalier.models.variants import narrowed

        return narrowed(architecture, level)

    def before_run(self, state: CloudState, ask: Inquiry) -> None:
        """Give every width its own statistics."""
        sections: dict[str, np.ndarray] = {}
        for width in parse_levels(self.settings.levels):
            spec = self.variant(state.architecture, width)
            own = sliced(state.weights, spec).views()
            sections |= {_key(width, t.name): own[t.name] for t in spec.tensors if t.buffer}
        state.weights = Weights.pack(state.tensors | sections)

    def view(self, state: CloudState, key: str) -> pb.View:
        """Return the network of a width and the statistics of all widths up to it."""
        spec = self.variant(state.architecture, float(key))
        tensors = list(Layout.from_proto(spec.tensors, "cloud").tensors)
        for t in state.weights.layout.tensors:
            width = t.name.partition("/")[0]
            if "/" in t.name and float(width.removeprefix("p")) <= float(key):
                tensors.append(TensorSpec(t.name, t.dtype, t.shape))
        return pb.View(architecture=spec, layout=Layout(tuple(tensors)).to_proto())

    def objective(self, round_: int) -> Objective:
        """Return ordered dropout's loss."""
        from espalier.training.ordered import OrderedDropout

        return OrderedDropout()

    def returned(self, sent: Layout, names: Sequence[str], metrics: Mapping[str, float]) -> Layout:
        """Return everything: network and statistics."""
        return sent

    def deployed(self, state: CloudState, ask: Inquiry) -> list[Deployed]:
        """Return the network of every width with the statistics of that width."""
        found: list[Deployed] = []
        tensors = state.tensors
        for width in parse_levels(self.settings.levels):
            spec = self.variant(state.architecture, width)
            arrays = sliced(state.weights, spec).views()
            arrays |= {t.name: tensors[_key(width, t.name)] for t in spec.tensors if t.buffer}
            label = "global" if width == 1 else f"level {width:g}"
            found.append(Deployed(label, spec, Weights.pack(arrays), at_clients=not found))
        return found


def _key(width: float, name: str) -> str:
    return f"p{width:g}/{name}"
