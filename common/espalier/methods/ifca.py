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
from espalier.wire.payload import Layout, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from espalier.config.run_settings import RunSettings
    from espalier.training.objectives import LocalRound

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
            answers = ask("loss", state.architecture, state.weights, None)
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
        tensors = {n: a for n, a in networks[0].items() if matches(n, shared)}
        for j, arrays in enumerate(networks):
            tensors |= {_key(j, n): a for n, a in arrays.items() if not matches(n, shared)}
        state.weights = Weights.pack(tensors)

    # --- client --------------------------------------------------------------------------------------

    def start(self, local: LocalRound) -> Mapping[str, Tensor]:
        """Choose the model with the lowest loss on all of the client's images."""
        clusters = [
            dict(local.received)
            | {
                n.partition("/")[2]: models.to_tensor(a)
                for n, a in local.aux.items()
                if n.startswith(_key(j, ""))
            }
            for j in range(self.settings.of(IFCA.Settings).clusters)
        ]
        chosen = nearest_model([network_loss(local, tensors) for tensors in clusters])
        local.metrics["cluster"] = chosen
        return clusters[chosen]

    def publish(self, trained: dict[str, np.ndarray], local: LocalRound) -> dict[str, np.ndarray]:
        """Return the trained tensors under their cluster's names."""
        j, shared = int(local.metrics["cluster"]), self.settings.of(IFCA.Settings).shared_layers
        return {n if matches(n, shared) else _key(j, n): a for n, a in trained.items()}

    def returned(self, sent: Layout, names: Sequence[str], metrics: Mapping[str, float]) -> Layout:
        """Return the layout of the chosen cluster's and the shared tensors."""
        j = metrics.get("cluster", -1)
        if j not in range(clusters := self.settings.of(IFCA.Settings).clusters):
            raise ValueError(f"cluster {j:g} of {clusters}")
        return sent.only(n for n in sent.names if "/" not in n or n.startswith(_key(int(j), "")))

    # --- cloud ---------------------------------------------------------------------------------------

    def deployed(self, state: CloudState, ask: Inquiry) -> list[Deployed]:
        """Return the clusters' models; at clients, the best of all of them is evaluated."""
        shared = {n: a for n, a in state.tensors.items() if "/" not in n}
        clusters = [
            Deployed(
                f"cluster {j + 1}",
                state.architecture,
                Weights.pack(shared | state.section(f"cluster{j}")),
                at_clients=False,
            )
            for j in range(self.settings.of(IFCA.Settings).clusters)
        ]
        everything = Deployed("all clusters", state.architecture, state.weights, at_cloud=False)
        return [*clusters, everything]


def _key(cluster: int, name: str) -> str:
    return f"cluster{cluster}/{name}"
