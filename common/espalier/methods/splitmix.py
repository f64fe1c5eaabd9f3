"""Split-Mix: independent base networks, as many a client as it can train (Hong et al., ICLR 2022, arXiv 2203.09747)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from espalier.methods.base import CloudState, Deployed, Inquiry, Method
from espalier.methods.levels import assign_levels, parse_levels
from espalier.methods.planning import Member
from espalier.methods.submodels import sliced
from espalier.seeds import rng_for
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from torch import nn

    from espalier.config.run_config import RunConfig
    from espalier.training.objectives import Objective


class SplitMix(Method):
    """Algorithm 1.

    The network is split into B = 1/base-width narrow ones that never share a weight. A client of
    budget R trains R·B of them: the first is the next of a shuffled round over all bases, so that each
    gets its turn, the others are drawn. Servers average each base by samples over the clients that
    trained it. Of any width R, the mean logits of the first R·B bases answer.
    """

    name = "split-mix"
    tasks = ("classification",)
    families = ("mlp", "cnn", "resnet")
    has_levels = True

    @classmethod
    def contradictions(cls, settings: RunConfig) -> list[str]:
        """Refuse a base width that does not divide the network."""
        count = 1 / settings.base_width
        if abs(count - round(count)) > 1e-9:
            return [f"base-width: {settings.base_width:g} is no 1/B; set it to 0.5, 0.25, 0.125, …"]
        return []

    @property
    def bases(self) -> int:
        """B."""
        return round(1 / self.settings.base_width)

    def initial(self, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return all bases, with weights as small as in the whole network."""
        from espalier.models.initial import initial_bases

        return initial_bases(
            self.settings, image_shape, classes, self.settings.base_width, range(self.bases), rescaled=True
        )

    def assign(
        self, state: CloudState, picked: Sequence[str], members: Mapping[str, Member], round_: int
    ) -> dict[str, str]:
        """Return the bases of each picked client, e.g. "3,5"."""
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
        from espalier.models.variants import with_members

        return pb.View(architecture=with_members(state.architecture, map(int, key.split(","))))

    def objective(self, round_: int) -> Objective:
        """Return the sum of the bases' own cross-entropies."""
        from espalier.training.bases import BaseLosses

        return BaseLosses()

    def deployed(self, state: CloudState, ask: Inquiry) -> list[Deployed]:
        """Return the ensemble of all bases, and those of the smaller levels."""
        from espalier.models.variants import with_members

        found = super().deployed(state, ask)
        for level in parse_levels(self.settings.levels):
            if level < 1:
                spec = with_members(state.architecture, range(max(1, round(level * self.bases))))
                weights = sliced(state.weights, spec)
                found.append(Deployed(f"level {level:g}", spec, weights, at_clients=False))
        return found
