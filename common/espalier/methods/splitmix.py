"""Split-Mix: ensembles of independent base networks (Hong et al., ICLR 2022, arXiv 2203.09747)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from espalier import models
from espalier.config.fields import SettingsGroup
from espalier.methods.base import CloudState, Deployed, Inquiry, Method
from espalier.methods.levels import LevelSettings, assign_levels
from espalier.methods.planning import Member
from espalier.methods.submodels import sliced
from espalier.seeds import rng_for
from espalier.tasks.classification import cross_entropy
from espalier.training.objectives import Objective
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from espalier.config.run_settings import RunSettings


class SplitMix(Method):
    """Algorithm 1.

    The network is split into B = 1/base-width narrow base networks without shared weights. A client of budget R trains
    R·B of them: the first comes from a shuffled cycle over all bases, so that each is trained equally often, the others
    are sampled. Servers average each base by samples over the clients that trained it. A network of width R predicts
    with the mean logits of the first R·B bases.
    """

    class Settings(SettingsGroup):
        """The base networks."""

        base_width: float = Field(default=0.125, gt=0, le=1, description="width of a base network")

    name = "split-mix"
    uses = (Settings, LevelSettings)
    tasks = ("classification",)
    families = ("mlp", "cnn", "resnet")
    has_levels = True

    @classmethod
    def contradictions(cls, settings: RunSettings) -> list[str]:
        """Refuse a base width that does not divide the network."""
        width = settings.of(SplitMix.Settings).base_width
        count = 1 / width
        if abs(count - round(count)) > 1e-9:
            return [f"base-width: {width:g} is no 1/B; set it to 0.5, 0.25, 0.125, …"]
        return []

    @property
    def bases(self) -> int:
        """B."""
        return round(1 / self.settings.of(SplitMix.Settings).base_width)

    def initial(self, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return all bases, their weights scaled as in the full-width network."""
        return models.initial_bases(
            self.settings,
            image_shape,
            classes,
            self.settings.of(SplitMix.Settings).base_width,
            range(self.bases),
            rescaled=True,
        )

    def assign(
        self, state: CloudState, picked: Sequence[str], members: Mapping[str, Member], round_: int
    ) -> dict[str, str]:
        """Return the bases of each participant, e.g. "3,5"."""
        levels = assign_levels(list(members.values()), self.settings, round_)
        chosen = {}
        for place, name in enumerate(sorted(picked)):
            turn, at = divmod((round_ - 1) * len(picked) + place, self.bases)
            first = int(rng_for(self.settings.seed, "cloud", turn, "bases").permutation(self.bases)[at])
            others = [b for b in range(self.bases) if b != first]
            count = max(1, round(levels[name] * self.bases))
            rng = rng_for(self.settings.seed, name, round_, "bases")
            drawn = rng.choice(others, min(count, self.bases) - 1, replace=False).tolist()
            chosen[name] = ",".join(str(b) for b in sorted([first, *drawn]))
        return chosen

    def view(self, state: CloudState, key: str) -> pb.View:
        """Return the ensemble of some bases."""
        return pb.View(architecture=models.with_members(state.architecture, map(int, key.split(","))))

    def objective(self, round_: int) -> Objective:
        """Return the sum of the bases' own cross-entropies."""
        return BaseLosses()

    def deployed(self, state: CloudState, ask: Inquiry) -> list[Deployed]:
        """Return the ensemble of all bases and those of the smaller levels."""
        found = super().deployed(state, ask)
        for level in self.settings.of(LevelSettings).shares:
            if level < 1:
                spec = models.with_members(state.architecture, range(max(1, round(level * self.bases))))
                weights = sliced(state.weights, spec)
                found.append(Deployed(f"level {level:g}", spec, weights, at_clients=False))
        return found


class BaseLosses(Objective):
    """The sum of every base network's own cross-entropy.

    The base networks share no parameter, so a step on the sum is an independent step of each. Their logits are averaged
    for prediction only: the loss of the mean would couple them.
    """

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the sum of the cross-entropies."""
        return cross_entropy(
            [network(images).float() for network in models.bases.members(model).values()], labels
        )
