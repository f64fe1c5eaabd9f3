"""Sub-models: the base of methods whose clients train parts of the model of different sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from espalier.methods.base import CloudState, Deployed, Inquiry, Method
from espalier.methods.levels import LevelSettings, assign_levels
from espalier.methods.planning import Member
from espalier.wire.payload import Weights
from espalier_proto import espalier_pb2 as pb


class SubModels(Method):
    """Every client has a level, a share in (0, 1], and trains the leading slice of that size.

    Servers average each coordinate over the clients that hold it; a coordinate that none holds does not change. A
    subclass defines the network of a level.
    """

    tasks = ("classification",)
    families: ClassVar[tuple[str, ...]] = ("mlp", "cnn", "resnet")
    has_levels = True

    def variant(self, architecture: pb.ArchitectureSpec, level: float) -> pb.ArchitectureSpec:
        """Return the network of a level."""
        raise NotImplementedError

    def assign(
        self, state: CloudState, picked: Sequence[str], members: Mapping[str, Member], round_: int
    ) -> dict[str, str]:
        """Return each participant's level as text."""
        levels = assign_levels(list(members.values()), self.settings, round_)
        return {name: f"{levels[name]:g}" for name in picked}

    def view(self, state: CloudState, key: str) -> pb.View:
        """Return the network of a level."""
        return pb.View(architecture=self.variant(state.architecture, float(key)))

    def deployed(self, state: CloudState, ask: Inquiry) -> list[Deployed]:
        """Return the whole network, and the sub-model of every smaller level."""
        found = super().deployed(state, ask)
        for level in self.settings.of(LevelSettings).shares:
            if level < 1:
                spec = self.variant(state.architecture, level)
                found.append(
                    Deployed(f"level {level:g}", spec, sliced(state.weights, spec), at_clients=False)
                )
        return found


def depth_at(level: float, whole: int) -> int:
    """Return the depth of a level in a network of `whole` stages: rounded, at least 1."""
    return max(1, math.floor(level * whole + 0.5))


def sliced(weights: Weights, architecture: pb.ArchitectureSpec) -> Weights:
    """Return the leading slices of a payload in the shapes of a sub-network's tensors."""
    views = weights.views()
    return Weights.pack(
        {t.name: views[t.name][tuple(slice(0, n) for n in t.shape)] for t in architecture.tensors}
    )
