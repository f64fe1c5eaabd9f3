"""InclusiveFL: tiers of different depth (Liu et al., KDD 2022, arXiv 2202.08036)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from espalier import lazy, models
from espalier.config.fields import SettingsGroup
from espalier.methods.aggregate import Aggregate
from espalier.methods.base import CloudState, Deployed, Inquiry, ServerState, Update
from espalier.methods.levels import LevelSettings
from espalier.methods.submodels import SubModels, depth_at
from espalier.training.forward_hooks import require_exits
from espalier.training.objectives import LocalRound, Objective
from espalier.wire.payload import Weights
from espalier.wire.sections import SectionId, Sections
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn
    from torch.nn import functional
else:
    functional = lazy.load("torch.nn.functional")

#: Names of the sections, whose members are depths: a tier's own tensors, the changes of its last stage, and the
#: changes that this stage follows. The last two are zeros: servers aggregate changes under their layouts.
OWN, CHANGE, NEXT = "depth", "own", "next"
_STAGE = re.compile(r"stage(\d+)\.(.+)")


class InclusiveFL(SubModels):
    """Sections 3.2 and 3.3, with local training instead of single gradients.

    A tier of depth d trains the first d stages and one exit after the last of them. A stage shared by several
    tiers is averaged over all of them by samples. A tier's own tensors, its exit and its last stage, are in a
    section of its own. The last stage is also updated towards the next deeper tier (momentum distillation): its change
    is (1 − β) Δ_last + β · mean of the deeper tier's Δ over its stages from d on, as far as their tensors have the
    shape of the stage's own.

    The authors' code never applies the momentum; the formula is the paper's.
    """

    class Settings(SettingsGroup):
        """Momentum distillation."""

        inclusive_beta: float = Field(
            default=0.2,
            ge=0,
            le=1,
            description="share of the deeper tier's momentum in a last layer",
        )

    name = "inclusivefl"
    uses = (Settings, LevelSettings)
    families = ("exits",)
    server_sections = frozenset({CHANGE, NEXT})

    # --- tiers -----------------------------------------------------------------------------------------

    def depths(self, architecture: pb.ArchitectureSpec) -> list[int]:
        """Return the depths of the tiers, the shallowest first."""
        whole = self._whole_depth(architecture)
        return sorted({depth_at(level, whole) for level in self.settings.of(LevelSettings).shares})

    @staticmethod
    def _whole_depth(architecture: pb.ArchitectureSpec) -> int:
        # Read from the tensors: edges have no torch to build the network with.
        return max(int(m[1]) for t in architecture.tensors if (m := _STAGE.match(t.name)))

    def variant(self, architecture: pb.ArchitectureSpec, level: float) -> pb.ArchitectureSpec:
        """Return the network of a tier."""
        return models.with_last_exit(architecture, depth_at(level, self._whole_depth(architecture)))

    def initial(self, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return the deepest tier's network; the other tiers' own tensors are initialised with it."""
        whole = super().initial(image_shape, classes)
        self._initial, spec = whole.state_dict(), models.describe(whole)
        deepest = models.with_last_exit(spec, models.depth_of(spec))
        return models.build_with(deepest, {t.name: self._initial[t.name] for t in deepest.tensors})

    def before_run(self, state: CloudState, ask: Inquiry) -> None:
        """Add the own exit and last stage of every tier but the deepest."""
        for depth in self.depths(state.architecture)[:-1]:
            own = {
                name: tensor.numpy()
                for name, tensor in self._initial.items()
                if name.startswith((f"stage{depth}.", f"exit{depth}."))
            }
            trained = [n for n in own if _STAGE.match(n) and n not in state.buffers]
            zeros = {n: np.zeros_like(own[n]) for n in trained}
            state.put({at(OWN, depth): own, at(CHANGE, depth): zeros, at(NEXT, depth): zeros})

    def view(self, state: CloudState, key: str) -> pb.View:
        """Return a tier's network, with its own tensors from its own section."""
        spec = self.variant(state.architecture, float(key))
        own = at(OWN, self._whole_depth(spec))
        source = pb.SectionName(name=own.name, member=own.member)
        there = state.section(own)
        return pb.View(architecture=spec, sources={t.name: source for t in spec.tensors if t.name in there})

    def objective(self, round_: int) -> Objective:
        """Return the cross-entropy of the last exit."""
        return LastExit()

    # --- servers -----------------------------------------------------------------------------------------

    def contribute(self, aggregate: Aggregate, update: Update, server: ServerState) -> None:
        """Add the client's tensors, its Δ_last, and its Δ that the next shallower tier follows."""
        depths, weight = self.depths(server.architecture), self.weight_of(update)
        names = [n for arrays in update.sections.values() for n in arrays]
        held = max(int(m[1]) for n in names if (m := _STAGE.match(n)))
        if held not in depths:
            raise ValueError(f"a network of depth {held}, which no tier has")
        aggregate.mean(update.sections, weight)
        change = {
            section: {n: a - update.received[section][n] for n, a in arrays.items()}
            for section, arrays in update.sections.items()
        }
        last = server.section(at(CHANGE, held))
        own = {n: d for n, d in change.get(at(OWN, held), {}).items() if n in last}
        aggregate.mean({at(CHANGE, held): own}, weight, counted=True)
        if shallower := [d for d in depths if d < held]:
            for followed, array in self._followed(server, change, shallower[-1]):
                aggregate.mean({at(NEXT, shallower[-1]): {followed: array}}, weight, counted=True)

    def _followed(
        self, server: ServerState, change: Sections, below: int
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the changes of a tier's stages from `below` on, with the shallower tier's tensor that follows each."""
        targets = server.section(at(NEXT, below))
        for arrays in change.values():
            for name, array in arrays.items():
                found = _STAGE.match(name)
                if found and int(found[1]) >= below:
                    target = f"stage{below}.{found[2]}"
                    if target in targets and targets[target].shape == array.shape:
                        yield target, array

    def step(self, server: ServerState, aggregate: Aggregate) -> None:
        """Take the means; the change of a last stage becomes (1 − β) Δ_last + β Δ_next."""
        means = aggregate.means(server.payload.views())
        for depth in self.depths(server.architecture)[:-1]:
            own, last, following = (means.get(at(part, depth), {}) for part in (OWN, CHANGE, NEXT))
            for name in own.keys() & last.keys() & following.keys():
                beta = own[name].dtype.type(self.settings.of(InclusiveFL.Settings).inclusive_beta)
                own[name] = own[name] + beta * (following[name] - last[name])
        server.assign({s: arrays for s, arrays in means.items() if s.name not in self.server_sections})

    def deployed(self, state: CloudState, ask: Inquiry) -> list[Deployed]:
        """Return every tier's network, the deepest first."""
        found: list[Deployed] = []
        for level in self.settings.of(LevelSettings).shares:
            spec = self.variant(state.architecture, level)
            tensors = state.tensors | state.section(at(OWN, self._whole_depth(spec)))
            arrays: dict[str, np.ndarray] = {t.name: tensors[t.name] for t in spec.tensors}
            label = f"level {level:g}" if found else "global"
            found.append(Deployed(label, spec, Weights.pack(arrays), at_clients=not found))
        return found


def at(part: str, depth: int) -> SectionId:
    """Return a section of the tier of a depth."""
    return SectionId(part, str(depth))


class LastExit(Objective):
    """Cross-entropy of the deepest exit alone, the only one of InclusiveFL (Liu et al., KDD 2022)."""

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Check that the network has exits."""
        require_exits(model)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the cross-entropy; the other exits are not computed."""
        network = require_exits(model)
        logits: Tensor = network.exit(network.depth)(network.maps(images)[-1])
        return functional.cross_entropy(logits.float(), labels)
