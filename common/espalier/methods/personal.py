"""Personal layers: the base of methods whose clients do not exchange some layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from espalier import models
from espalier.methods.base import CloudState, Deployed, Inquiry, Method
from espalier.methods.planning import Member
from espalier.wire.payload import Layout, Weights
from espalier.wire.sections import MODEL, Layouts, SectionId, layouts_to_proto
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from torch import Tensor

    from espalier.training.objectives import LocalRound

#: Prefix of the personal layers in a client's state.
STATE = "personal/"
#: Key of the view that holds the shared tensors.
SHARED = "shared"


class PersonalLayers(Method):
    """Some tensors never leave a client: it starts from the run's initial values and stores its own.

    The cloud's copy of them does not change, so its network alone cannot be evaluated; clients' networks are
    evaluated by samples that the clients draw (`eval-clients`).
    """

    sticky_edge = True

    def is_personal(self, name: str) -> bool:
        """Return whether a tensor is personal."""
        raise NotImplementedError

    def assign(
        self, state: CloudState, picked: Sequence[str], members: Mapping[str, Member], round_: int
    ) -> dict[str, str]:
        """Return the view of the shared tensors for all clients, if some tensors are personal."""
        some = any(self.is_personal(t.name) for t in state.architecture.tensors)
        return dict.fromkeys(picked, SHARED) if some else {}

    def view(self, state: CloudState, key: str) -> pb.View:
        """Return the shared tensors."""
        layouts = {MODEL: self.shared(state.weights.layout)}
        return pb.View(architecture=state.architecture, sections=layouts_to_proto(layouts))

    def shared(self, model: Layout) -> Layout:
        """Return the layout of the tensors that are not personal."""
        return model.only(n for n in model.names if not self.is_personal(n))

    def start(self, local: LocalRound) -> Mapping[str, Tensor]:
        """Return the received tensors and the client's own layers."""
        assert local.architecture is not None
        personal = [t.name for t in local.architecture.tensors if t.name not in local.received]
        if not personal:
            return local.received
        own: Mapping[str, np.ndarray] = {
            n.removeprefix(STATE): a for n, a in local.state.items() if n.startswith(STATE)
        }
        if not own:
            assert local.data is not None
            own = models.model_arrays(self.initial(local.data.shape, len(local.labels)))
        return dict(local.received) | {n: models.to_tensor(own[n]) for n in personal}

    def publish(
        self, trained: dict[str, np.ndarray], local: LocalRound
    ) -> dict[SectionId, dict[str, np.ndarray]]:
        """Store the personal tensors, return the others."""
        for name, array in trained.items():
            if self.is_personal(name):
                local.state[STATE + name] = array.copy()
        return {MODEL: {n: a for n, a in trained.items() if not self.is_personal(n)}}

    def returned(self, sent: Layouts, names: Sequence[str], metrics: Mapping[str, float]) -> Layouts:
        """Return the layout of the requested tensors without the personal ones."""
        return super().returned(sent, [n for n in names if not self.is_personal(n)], metrics)

    def deployed(self, state: CloudState, ask: Inquiry) -> list[Deployed]:
        """Return the network; with personal layers, for clients only."""
        [network] = super().deployed(state, ask)
        if any(self.is_personal(t.name) for t in state.architecture.tensors):
            weights = Weights.fill(self.shared(network.weights.layout), network.weights.views())
            return [Deployed("personal", state.architecture, weights, at_cloud=False)]
        return [network]
