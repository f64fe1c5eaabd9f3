"""FedDyn: federated learning with dynamic regularisation (Acar et al., ICLR 2021, arXiv 2111.04263)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from espalier import lazy
from espalier.config.fields import Positive, SettingsGroup
from espalier.config.run_settings import Groups
from espalier.methods.aggregate import Aggregate
from espalier.methods.base import CloudState, Inquiry, Method, ServerState, Update
from espalier.methods.proximal import SquaredDistance
from espalier.training.named_state import on_device, read_blocks, trainable_parameters, write_blocks
from espalier.training.objectives import LocalResult, LocalRound, Objective
from espalier.wire.sections import MODEL, SectionId

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn
else:
    torch = lazy.load("torch")

#: Section of the servers' h, and prefix of g_k in a client's state.
H, STATE = SectionId("dyn"), "dyn/"


class FedDyn(Method):
    """Algorithm 1.

    Clients minimise F_k(θ) − ⟨g_k, θ⟩ + α/2 ‖θ − w‖² and update g_k ← g_k − α(θ_k − w). Servers update
    h ← h − (α/N) Σ_S (θ_k − w), which stays the mean of all g_k, and send w = mean_S θ_k − h/α. A
    coordinate that no participant holds does not change (for sub-models this is DepthFL's rule); running statistics
    and counters are averaged without h. Between its reports an edge updates its own w and h.
    """

    class Settings(SettingsGroup):
        """The dynamic regulariser."""

        dyn_alpha: Positive = Field(default=0.1, description="weight alpha of the dynamic regulariser")

    name = "feddyn"
    uses: ClassVar[Groups] = (Settings,)
    own_optimizer = "sgd"
    own_selection = "bernoulli"
    own_weighting = "uniform"
    server_sections = frozenset({H.name})
    mean_sections = frozenset({H.name})
    sticky_edge = True
    per_example_loss = True

    def before_run(self, state: CloudState, ask: Inquiry) -> None:
        """Start from h = 0."""
        state.add_section(H)

    # --- client --------------------------------------------------------------------------------------

    def objective(self, round_: int) -> Objective:
        """Return the task's loss and the dynamic regulariser."""
        return super().objective(round_) + DynamicRegularizer(self.settings.of(FedDyn.Settings).dyn_alpha)

    # --- edge and cloud ------------------------------------------------------------------------------

    def contribute(self, aggregate: Aggregate, update: Update, server: ServerState) -> None:
        """Add θ_k to the mean, −(α/N)(θ_k − w) to the change of h."""
        aggregate.mean(update.sections, self.weight_of(update))
        trained, received, h = update.sections[MODEL], update.received[MODEL], server.section(H)
        drift = {name: trained[name] - received[name] for name in trained if name in h}
        aggregate.sum({H: drift}, -self.settings.of(FedDyn.Settings).dyn_alpha / server.population)

    def step(self, server: ServerState, aggregate: Aggregate) -> None:
        """Update h, then w."""
        before, alpha, h = (
            server.payload.views(),
            self.settings.of(FedDyn.Settings).dyn_alpha,
            server.section(H),
        )
        h = {name: h[name] + change for name, change in aggregate.sums().get(H, {}).items()}
        means = aggregate.means(before)
        for name, mean in means.get(MODEL, {}).items():
            if name in h:
                moved = mean - h[name] / mean.dtype.type(alpha)
                means[MODEL][name] = np.where(aggregate.held(name), moved, before[MODEL][name])
        server.assign({**means, H: h})


class DynamicRegularizer(Objective):
    """``-<theta, g_k> + alpha/2 ||theta - w||^2``, then ``g_k <- g_k - alpha (theta_k - w)``.

    g_k starts at zero and converges to the gradient of the client's own loss at the common optimum, so that every
    client's regularised loss has its minimum there. It covers parameters only. A sub-network uses the leading block of
    the stored g_k (DepthFL); values outside the block do not change. theta_k is the model as the server decodes it, so
    that the server's h stays the mean of all g_k.

    Parameters
    ----------
    alpha : float
        Weight of the regulariser, the server's alpha, too.
    """

    depends_on = "weights"

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Read the received parameters w and g_k."""
        self._local = local
        self._distance = SquaredDistance(model, local)
        self._g = read_blocks(local.state, STATE, trainable_parameters(model))
        self._flat_g = torch.cat([g.flatten() for g in self._g.values()])

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the regulariser's value; it does not depend on the batch."""
        flat = self._distance.flat()
        return 0.5 * self._alpha * self._distance.squared(flat) - (flat * self._flat_g).sum()

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        """Update g_k."""
        received = self._local.received
        updated = {
            name: g - self._alpha * (on_device(model, sent, name) - on_device(model, received, name))
            for name, g in self._g.items()
        }
        write_blocks(self._local.state, STATE, updated)
        return {}
