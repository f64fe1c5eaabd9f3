"""What methods share whose clients keep some layers at home."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from espalier.methods.base import CloudState, Deployed, Inquiry, Method
from espalier.methods.planning import Member
from espalier.wire.payload import Layout
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from torch import Tensor

    from espalier.training.objectives import LocalRound

#: Where a client keeps its own layers.
HOME = "personal/"
SHARED = "shared"


class PersonalLayers(Method):
    """Some tensors never leave a client: it starts from the run's initial ones and keeps its own.

    The cloud's copy of them stays as it was, so its network is of no use alone; what clients reach
    is measured by samples they draw (`eval-clients`).
    """

    settled = True

    def stays_home(self, name: str) -> bool:
        """Tell whether a tensor is personal."""
        raise NotImplementedError

    def assign(
        self, state: CloudState, picked: Sequence[str], members: Mapping[str, Member], round_: int
    ) -> dict[str, str]:
        """Return the view of the shared tensors for everybody, if some are personal."""
        some = any(self.stays_home(t.name) for t in state.architecture.tensors)
        return dict.fromkeys(picked, SHARED) if some else {}

    def view(self, state: CloudState, key: str) -> pb.View:
        """Return the shared tensors."""
        layout = state.weights.layout
        kept = layout.only(n for n in layout.names if "/" not in n and not self.stays_home(n))
        return pb.View(architecture=state.architecture, layout=kept.to_proto())

    def start(self, local: LocalRound) -> Mapping[str, Tensor]:
        """Return what was received, and the client's own layers."""
        from espalier.models.arrays import model_arrays, to_tensor

        assert local.architecture is not None
        home = [t.name for t in local.architecture.tensors if t.name not in local.received]
        if not home:
            return local.received
        own: Mapping[str, np.ndarray] = {
            n.removeprefix(HOME): a for n, a in local.state.items() if n.startswith(HOME)
        }
        if not own:
            assert local.data is not None
            own = model_arrays(self.initial(local.data.shape, len(local.labels)))
        return dict(local.received) | {n: to_tensor(own[n]) for n in home}

    def publish(self, trained: dict[str, np.ndarray], local: LocalRound) -> dict[str, np.ndarray]:
        """Keep the personal tensors, return the others."""
        for name, array in trained.items():
            if self.stays_home(name):
                local.state[HOME + name] = array.copy()
        return {n: a for n, a in trained.items() if not self.stays_home(n)}

    def returned(self, sent: Layout, names: Sequence[str], metrics: Mapping[str, float]) -> Layout:
        """Return the tensors that the plan wants, without personal ones."""
        return sent.only(n for n in names if not self.stays_home(n))

    def deployed(self, state: CloudState, ask: Inquiry) -> list[Deployed]:
        """Return the network; where layers are personal, only clients can use it."""
        [network] = super().deployed(state, ask)
        if any(self.stays_home(t.name) for t in state.architecture.tensors):
            shared = network.weights.layout.only(
                n for n in network.weights.layout.names if "/" not in n and not self.stays_home(n)
            )
            from espalier.wire.payload import Weights

            views = network.weights.views()
            weights = Weights.fill(shared, {n: views[n] for n in shared.names})
            return [Deployed("personal", state.architecture, weights, at_cloud=False)]
        return [network]
