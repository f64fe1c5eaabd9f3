"""InclusiveFL: tiers of different depth (Liu et al., KDD 2022, arXiv 2202.08036)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from espalier import lazy, models
from espalier.config.fields import SettingsGroup
from espalier.methods.base import CloudState, Deployed, Inquiry, ServerState, Update
from espalier.methods.levels import LevelSettings
from espalier.methods.submodels import SubModels, depth_at
from espalier.methods.tally import Tally
from espalier.training.forward_hooks import require_exits
from espalier.training.objectives import LocalRound, Objective
from espalier.wire.payload import Weights
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn
    from torch.nn import functional
else:
    functional = lazy.load("torch.nn.functional")

_STAGE = re.compile(r"stage(\d+)\.(.+)")


class InclusiveFL(SubModels):
    """Sections 3.2 and 3.3, with local training instead of single gradients.

    A tier of depth d trains the first d stages and one exit after the last of them. A stage shared by several
    tiers is averaged over all of them by samples. A tier's own tensors, its exit and its last stage, are stored as
    "depthD/…". The last stage is also updated towards the next deeper tier (momentum distillation): its change is
    (1 − β) Δ_last + β · mean of the deeper tier's Δ over its stages from d on, as far as their tensors have the
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
    server_sections = frozenset({"own", "next"})

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
        own = {
            f"depth{d}/{name}": tensor.numpy()
            for d in self.depths(state.architecture)[:-1]
            for name, tensor in self._initial.items()
            if name.startswith((f"stage{d}.", f"exit{d}."))
        }
        # Zeros under whose names servers aggregate the changes of last stages and those of the deeper tier.
        trained = [n for n in own if _STAGE.search(n) and n.rpartition("/")[2] not in state.buffers]
        sums = {f"{section}/{n}": np.zeros_like(own[n]) for section in ("own", "next") for n in trained}
        state.weights = Weights.pack(state.tensors | own | sums)

    def view(self, state: CloudState, key: str) -> pb.View:
        """Return a tier's network, with its own tensors from its own section."""
        spec = self.variant(state.architecture, float(key))
        own = f"depth{self._whole_depth(spec)}/"
        there = set(state.tensors)
        return pb.View(
            architecture=spec, sources={t.name: own + t.name for t in spec.tensors if own + t.name in there}
        )

    def objective(self, round_: int) -> Objective:
        """Return the cross-entropy of the last exit."""
        return LastExit()

    # --- servers -----------------------------------------------------------------------------------------

    def contribute(self, tally: Tally, update: Update, server: ServerState) -> None:
        """Add the client's tensors, its Δ_last, and its Δ that the next shallower tier follows."""
        depths, weight = self.depths(server.architecture), self.weight_of(update)
        held = max(int(m[1]) for n in update.arrays if (m := _STAGE.search(n)))
        if held not in depths:
            raise ValueError(f"a network of depth {held}, which no tier has")
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
        """Yield a tier's tensors from stage `below` on, with the shallower tier's tensors that follow them."""
        for name, array in change.items():
            found = _STAGE.search(name)
            if found and int(found[1]) >= below:
                target = f"depth{below}/stage{below}.{found[2]}"
                if f"next/{target}" in server.tensors and server.tensors[target].shape == array.shape:
                    yield name, target

    def step(self, server: ServerState, tally: Tally) -> None:
        """Take the means; the change of a last stage becomes (1 − β) Δ_last + β Δ_next."""
        means = tally.means(server.tensors)
        for name in [n for n in means if f"next/{n}" in means and f"own/{n}" in means]:
            beta = means[name].dtype.type(self.settings.of(InclusiveFL.Settings).inclusive_beta)
            means[name] = means[name] + beta * (means[f"next/{name}"] - means[f"own/{name}"])
        server.assign({n: a for n, a in means.items() if not n.startswith(("own/", "next/"))})

    def deployed(self, state: CloudState, ask: Inquiry) -> list[Deployed]:
        """Return every tier's network, the deepest first."""
        found: list[Deployed] = []
        tensors = state.tensors
        for level in self.settings.of(LevelSettings).shares:
            view = self.view(state, f"{level:g}")
            arrays: dict[str, np.ndarray] = {
                t.name: tensors[view.sources.get(t.name, t.name)] for t in view.architecture.tensors
            }
            label = f"level {level:g}" if found else "global"
            found.append(Deployed(label, view.architecture, Weights.pack(arrays), at_clients=not found))
        return found


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
