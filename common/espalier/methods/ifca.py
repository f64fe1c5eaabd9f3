"""IFCA: an iterative algorithm for clusters of clients (Ghosh et al., NeurIPS 2020, arXiv 2006.04088)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from espalier import models
from espalier.config.fields import PositiveInt, SettingsGroup
from espalier.methods.base import CloudState, Deployed, Inquiry, Method
from espalier.methods.clustering import nearest_model, well_spread
from espalier.methods.prefixes import matches
from espalier.seeds import seed_for
from espalier.tasks.local_metrics import network_loss
from espalier.wire.payload import Weights
from espalier.wire.sections import MODEL, Layouts, Payload, SectionId

if TYPE_CHECKING:
    from torch import Tensor

    from espalier.config.run_settings import RunSettings
    from espalier.training.objectives import LocalRound

#: Name of the sections that hold the clusters' own tensors; their members are numbers.
CLUSTER = "cluster"
#: Largest number of initialisations; the last one is used in any case.
TRIES = 20


class IFCA(Method):
    """Algorithm 1, model averaging.

    Servers hold k models. A client receives all of them, chooses the one with the lowest loss on its own images,
    trains it and returns it. Each model becomes the mean over the clients that chose it; one that no client chose
    does not change. Tensors under `shared-layers` exist once and are averaged over all clients. Initial models are
    drawn until each is chosen by enough clients.
    """

    class Settings(SettingsGroup):
        """The clusters."""

        clusters: PositiveInt = Field(default=2, description="number of models")
        shared_layers: str = Field(
            default="", description="prefixes of the tensors all clusters share, commas between"
        )

    name = "ifca"
    uses = (Settings,)
    has_one_model = False
    extra_disclosure = "which cluster fits its images best"
    tasks = ("classification",)

    @classmethod
    def contradictions(cls, settings: RunSettings) -> list[str]:
        """Refuse a run without clusters."""
        if settings.of(IFCA.Settings).clusters < 2:
            return ["clusters: ifca needs at least 2 models; set clusters=2 or method=fedavg"]
        return []

    def before_run(self, state: CloudState, ask: Inquiry) -> None:
        """Draw k models until clients choose each of them."""
        k = self.settings.of(IFCA.Settings).clusters
        for attempt in range(TRIES):
            self._draw(state, attempt)
            answers = ask("loss", state.architecture, state.payload, None)
            chosen = [int(a.metrics["cluster"]) for a in answers.values()]
            if not chosen or well_spread(chosen, k):
                return

    def _draw(self, state: CloudState, attempt: int) -> None:
        s, own = self.settings, self.settings.of(IFCA.Settings)
        shared = own.shared_layers
        networks = []
        for j in range(own.clusters):
            seed = seed_for(s.seed, "cloud", attempt, f"cluster {j}")
            network = models.initial_model(
                s.model_copy(update={"seed": seed}), self.image_shape, self.classes
            )
            networks.append(models.model_arrays(network))
        common = {n: a for n, a in networks[0].items() if matches(n, shared)}
        drawn = [{n: a for n, a in arrays.items() if not matches(n, shared)} for arrays in networks]
        state.payload = Payload.pack({MODEL: common} | {cluster(j): arrays for j, arrays in enumerate(drawn)})

    # --- client --------------------------------------------------------------------------------------

    def start(self, local: LocalRound) -> Mapping[str, Tensor]:
        """Choose the model with the lowest loss on all of the client's images."""
        clusters = [
            dict(local.received)
            | {n: models.to_tensor(a) for n, a in local.sections.get(cluster(j), {}).items()}
            for j in range(self.settings.of(IFCA.Settings).clusters)
        ]
        chosen = nearest_model([network_loss(local, tensors) for tensors in clusters])
        local.metrics["cluster"] = chosen
        return clusters[chosen]

    def publish(
        self, trained: dict[str, np.ndarray], local: LocalRound
    ) -> dict[SectionId, dict[str, np.ndarray]]:
        """Return the trained tensors in their cluster's section, the shared ones in the model's."""
        j, shared = int(local.metrics["cluster"]), self.settings.of(IFCA.Settings).shared_layers
        return {
            MODEL: {n: a for n, a in trained.items() if matches(n, shared)},
            cluster(j): {n: a for n, a in trained.items() if not matches(n, shared)},
        }

    def returned(self, sent: Layouts, names: Sequence[str], metrics: Mapping[str, float]) -> Layouts:
        """Return the layouts of the chosen cluster's and the shared tensors."""
        j = metrics.get("cluster", -1)
        if j not in range(self.settings.of(IFCA.Settings).clusters):
            raise ValueError(f"cluster {j:g} of {self.settings.of(IFCA.Settings).clusters}")
        return {s: layout for s, layout in sent.items() if s in (MODEL, cluster(int(j)))}

    # --- cloud ---------------------------------------------------------------------------------------

    def deployed(self, state: CloudState, ask: Inquiry) -> list[Deployed]:
        """Return the clusters' models; at clients, the best of all of them is evaluated."""
        clusters = [
            Deployed(
                f"cluster {j + 1}",
                state.architecture,
                Weights.pack(state.tensors | state.section(cluster(j))),
                at_clients=False,
            )
            for j in range(self.settings.of(IFCA.Settings).clusters)
        ]
        own = {s: weights for s, weights in state.payload.items() if s != MODEL}
        everything = Deployed("all clusters", state.architecture, state.weights, at_cloud=False, sections=own)
        return [*clusters, everything]


def cluster(number: int) -> SectionId:
    """Return the section of a cluster's tensors."""
    return SectionId(CLUSTER, str(number))
