"""InclusiveFL: tiers of different depth (Liu et al., KDD 2022, arXiv 2202.08036)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from common.methods.base import CloudState, Deployed, Inquiry, ServerState, Update
from common.methods.levels import parse_levels
from common.methods.submodels import SubModels, depth_at
from common.methods.tally import Tally
from common.wire.payload import Weights
from proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from torch import nn

    from common.learning.objectives import Objective

_STAGE = re.compile(r"stage(\d+)\.(.+)")


class InclusiveFL(SubModels):
    """Sections 3.2 and 3.3, by local training instead of single gradients.

    A tier of depth d trains the first d stages and an exit behind the last. A stage that lies inside
    several tiers is averaged over all of them by samples. What a tier has for itself, the servers hold as
    "depthD/…": its exit and its last stage. That last stage also follows the next deeper tier
    (momentum distillation): its change is (1 − β) Δ_last + β · mean of the deeper tier's Δ over its
    stages from d on, as far as their tensors have the shape of the stage's own.

    The authors' code never applies the momentum; the formula is the paper's.
    """

    name = "inclusivefl"
    families = ("exits",)

    # --- tiers -----------------------------------------------------------------------------------------

    def depths(self, architecture: pb.ArchitectureSpec) -> list[int]:
        """Return the depths of the tiers, the shallowest first."""
        whole = self._whole_depth(architecture)
        return sorted({depth_at(level, whole) for level in parse_levels(self.settings.levels)})

    @staticmethod
    def _whole_depth(architecture: pb.ArchitectureSpec) -> int:
        # Read from the tensors: edges have no torch to build the network with.
        return max(int(m[1]) for t in architecture.tensors if (m := _STAGE.match(t.name)))

    def variant(self, architecture: pb.ArchitectureSpec, level: float) -> pb.ArchitectureSpec:
        """Return the network of a tier."""
        from common.models.variants import with_last_exit

        return with_last_exit(architecture, depth_at(level, self._whole_depth(architecture)))

    def initial(self, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return the deepest tier's network; the others' own tensors are drawn with it."""
        from common.models.architecture import build_with, describe
        from common.models.variants import depth_of, with_last_exit

        whole = super().initial(image_shape, classes)
        self._drawn, spec = whole.state_dict(), describe(whole)
        deepest = with_last_exit(spec, depth_of(spec))
        return build_with(deepest, {t.name: self._drawn[t.name] for t in deepest.tensors})

    def before_run(self, state: CloudState, ask: Inquiry) -> None:
        """Give every tier but the deepest its own exit and last stage."""
        own = {
            f"depth{d}/{name}": tensor.numpy()
            for d in self.depths(state.architecture)[:-1]
            for name, tensor in self._drawn.items()
            if name.startswith((f"stage{d}.", f"exit{d}."))
        }
        state.weights = Weights.pack(state.tensors | own)

    def view(self, state: CloudState, key: str) -> pb.View:
        """Return a tier's network, its own tensors from its own section."""
        spec = self.variant(state.architecture, float(key))
        own = f"depth{self._whole_depth(spec)}/"
        there = set(state.tensors)
        return pb.View(
            architecture=spec, sources={t.name: own + t.name for t in spec.tensors if own + t.name in there}
        )

    def objective(self, round_: int) -> Objective:
        """Return the cross-entropy of the one exit."""
        from common.learning.exits import LastExit

        return LastExit()

    # --- servers -----------------------------------------------------------------------------------------

    def contribute(self, tally: Tally, update: Update, server: ServerState) -> None:
        """Add to the means of what the client holds, and to the momentum of the tier below it."""
        weight = self.weight_of(update)
        tally.mean(update.arrays, weight)
        depths = self.depths(server.architecture)
        held = max(int(m[1]) for n in update.arrays if (m := _STAGE.search(n)))
        tier = depths.index(held) if held in depths else -1
        if tier < 1:
            if tier < 0:
                raise ValueError(f"a network of depth {held}, which is no tier's")
            return
        below = depths[tier - 1]
        for name, target, factor in self._followed(server, update, below):
            change = update.arrays[name] - update.received[name]
            tally.sum({target: change}, weight * factor)
        tally.count(f"depth{below}", weight)

    def _followed(self, server: ServerState, update: Update, below: int) -> Iterator[tuple[str, str, float]]:
        """Yield a deeper tier's tensor, the shallower one's that follows it, and its part of the mean."""
        buffers, tensors = server.buffers, server.tensors
        matches: dict[str, list[str]] = {}
        for name, array in update.arrays.items():
            found = _STAGE.search(name)
            if not found or int(found[1]) < below or name.rpartition("/")[2] in buffers:
                continue
            target = f"depth{below}/stage{below}.{found[2]}"
            if target in tensors and tensors[target].shape == array.shape:
                matches.setdefault(target, []).append(name)
        for target, names in matches.items():
            for name in names:
                yield name, target, 1.0 / len(names)

    def step(self, server: ServerState, tally: Tally) -> None:
        """Take the means, and let last stages follow the deeper tier."""
        before, beta = server.tensors, self.settings.inclusive_beta
        means = tally.means(before)
        for name, change in tally.sums().items():
            weight = tally.counts.get(name.partition("/")[0], 0.0)
            if name in means and weight > 0:
                old, kind = before[name], before[name].dtype.type
                momentum = change / kind(weight)
                means[name] = old + kind(1 - beta) * (means[name] - old) + kind(beta) * momentum
        server.assign(means)

    def deployed(self, state: CloudState, ask: Inquiry) -> list[Deployed]:
        """Return every tier's network, the deepest first."""
        found: list[Deployed] = []
        tensors = state.tensors
        for level in parse_levels(self.settings.levels):
            view = self.view(state, f"{level:g}")
            arrays: dict[str, np.ndarray] = {
                t.name: tensors[view.sources.get(t.name, t.name)] for t in view.architecture.tensors
            }
            label = f"level {level:g}" if found else "global"
            found.append(Deployed(label, view.architecture, Weights.pack(arrays), at_clients=not found))
        return found
