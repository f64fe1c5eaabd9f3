"""InclusiveFL: tiers of different depth (Liu et al., KDD 2022, arXiv 2202.08036)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from espalier.methods.base import CloudState, Deployed, Inquiry, ServerState, Update
from espalier.methods.levels import parse_levels
from espalier.methods.submodels import SubModels, depth_at
from espalier.methods.tally import Tally
from espalier.wire.payload import Weights
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from torch import nn

    from espalier.training.objectives import Objective

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
    server_sections = frozenset({"own", "next"})

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
        from espalier.models.variants import with_last_exit

        return with_last_exit(architecture, depth_at(level, self._whole_depth(architecture)))

    def initial(self, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return the deepest tier's network; the others' own tensors are drawn with it."""
        from espalier.models.architecture import build_with, describe
        from espalier.models.variants import depth_of, with_last_exit

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
        # Companions that hold nothing: servers add up the changes of last stages, and what they follow, there.
        trained = [n for n in own if _STAGE.search(n) and n.rpartition("/")[2] not in state.buffers]
        sums = {f"{section}/{n}": np.zeros_like(own[n]) for section in ("own", "next") for n in trained}
        state.weights = Weights.pack(state.tensors | own | sums)

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
        from espalier.training.exits import LastExit

        return LastExit()

    # --- servers -----------------------------------------------------------------------------------------

    def contribute(self, tally: Tally, update: Update, server: ServerState) -> None:
        """Add what the client holds, its Δ_last, and its Δ that the tier above it follows."""
        depths, weight = self.depths(server.architecture), self.weight_of(update)
        held = max(int(m[1]) for n in update.arrays if (m := _STAGE.search(n)))
        if held not in depths:
            raise ValueError(f"a network of depth {held}, which is no tier's")
        tally.mean(update.arrays, weight)
        change = {n: a - update.received[n] for n, a in update.arrays.items()}
        own = {f"own/{n}": d for n, d in change.items() if f"own/{n}" in server.tensors}
        tally.mean(own, weight, beside=True)
        if shallower := [d for d in depths if d < held]:
            for name, followed in self._followed(server, change, shallower[-1]):
                tally.mean({f"next/{followed}": change[name]}, weight, beside=True)

    def _followed(
        self, server: ServerState, change: Mapping[str, np.ndarray], below: int
    ) -> Iterator[tuple[str, str]]:
        """Yield tensors of a tier's stages from `below` on, and those of the tier below that follow them."""
        for name, array in change.items():
            found = _STAGE.search(name)
            if found and int(found[1]) >= below:
                target = f"depth{below}/stage{below}.{found[2]}"
                if f"next/{target}" in server.tensors and server.tensors[target].shape == array.shape:
                    yield name, target

    def step(self, server: ServerState, tally: Tally) -> None:
        """Take the means, and let last stages follow the deeper tier: (1 − β) Δ_last + β Δ_next."""
        means = tally.means(server.tensors)
        for name in [n for n in means if f"next/{n}" in means and f"own/{n}" in means]:
            beta = means[name].dtype.type(self.settings.inclusive_beta)
            means[name] = means[name] + beta * (means[f"next/{name}"] - means[f"own/{name}"])
        server.assign({n: a for n, a in means.items() if not n.startswith(("own/", "next/"))})

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
