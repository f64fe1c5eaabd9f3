"""SCAFFOLD: stochastic controlled averaging (Karimireddy et al., ICML 2020, arXiv 1910.06378)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from espalier.config.fields import Positive, SettingsGroup
from espalier.methods.aggregate import Aggregate
from espalier.methods.base import CloudState, Inquiry, Method, ServerState, Update
from espalier.training.named_state import on_device, read_blocks, trainable_parameters, write_blocks
from espalier.training.objectives import LocalResult, LocalRound, Objective
from espalier.wire.sections import MODEL, SectionId

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from espalier.config.run_settings import RunSettings

#: Section of the servers' c, and prefix of c_k in a client's state.
CONTROL, STATE = SectionId("control"), "scaffold/"


class SCAFFOLD(Method):
    """Algorithm 1 with option II.

    Clients step along g(θ) − c_k + c and update c_k⁺ = c_k − c + (w − y_k)/(Kη). Servers update
    w ← w + η_g · mean Δ_k and c ← c + (1/N) Σ Δc_k, all uniformly weighted, so that c stays the mean
    of all c_k. A client sends y_k and Kη only: Δc_k = −c + (w − y_k)/(Kη) follows from them. Between
    its reports an edge updates its own w and c; its changes of c add up at the cloud.
    """

    class Settings(SettingsGroup):
        """The step of the servers."""

        server_rate: Positive = Field(default=1.0, description="step size eta_g of the servers")

    name = "scaffold"
    uses = (Settings,)
    own_optimizer = "sgd"
    own_weighting = "uniform"
    mean_sections = frozenset({CONTROL.name})
    sticky_edge = True
    per_example_loss = True

    @classmethod
    def contradictions(cls, settings: RunSettings) -> list[str]:
        """Refuse optimisers whose step is not Kη times a mean gradient."""
        faults = []
        if settings.optimizer == "adam":
            faults.append(
                "optimizer: scaffold computes c_k from the length of SGD's steps; set optimizer=sgd"
            )
        if settings.momentum or settings.weight_decay:
            faults.append("momentum: scaffold's c_k would contain momentum and weight decay; set both to 0")
        return faults

    def before_run(self, state: CloudState, ask: Inquiry) -> None:
        """Start from c = 0."""
        state.add_section(CONTROL)

    # --- client --------------------------------------------------------------------------------------

    def objective(self, round_: int) -> Objective:
        """Return the task's loss, its gradients corrected by c − c_k."""
        return super().objective(round_) + ControlVariates()

    # --- edge and cloud ------------------------------------------------------------------------------

    def contribute(self, aggregate: Aggregate, update: Update, server: ServerState) -> None:
        """Add w + η_g Δ_k to the mean, Δc_k / N to the change of c."""
        rate, local = self.settings.of(SCAFFOLD.Settings).server_rate, update.metrics.get("lr-sum", 0.0)
        if not local > 0:
            raise ValueError(f"its sum of step sizes is {local}, so its control variate is unknown")
        trained, received = update.sections[MODEL], update.received[MODEL]
        moved, change = dict(trained), {}
        for name, c in server.section(CONTROL).items():
            w, y = received[name], trained[name]
            moved[name] = w + w.dtype.type(rate) * (y - w)
            change[name] = (w - y) / w.dtype.type(local) - c
        aggregate.mean({MODEL: moved}, self.weight_of(update))
        aggregate.sum({CONTROL: change}, 1.0 / server.population)

    def step(self, server: ServerState, aggregate: Aggregate) -> None:
        """Update w by the mean, and c."""
        super().step(server, aggregate)
        c, change = server.section(CONTROL), aggregate.sums().get(CONTROL, {})
        server.assign({CONTROL: {name: c[name] + delta for name, delta in change.items()}})


class ControlVariates(Objective):
    """Every step follows ``g(theta) - c_k + c``; then ``c_k <- c_k - c + (w - theta_k) / (K eta)``.

    c and c_k cover parameters only and start at zero. K eta is the sum of the applied learning rates, so it is
    right with a schedule, too. The reply contains it as "lr-sum", and the server recomputes the change of c_k,
    ``-c + (w - theta_k) / (K eta)``, from it and from the model it decodes, which is the theta_k used here. With
    momentum, weight decay or clipping c_k is an estimate that includes them; with Adam it is not an estimate of a
    gradient, so the method requires SGD (``LocalRound.optimizer``).
    """

    depends_on = "weights"

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Read c and c_k."""
        parameters = trainable_parameters(model)
        self._local = local
        self._c = read_blocks(local.sections.get(CONTROL, {}), "", parameters)
        self._c_k = read_blocks(local.state, STATE, parameters)
        self._correction = {name: c - self._c_k[name] for name, c in self._c.items()}

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return 0: the term only changes the gradients."""
        return images.new_zeros(())

    def after_backward(self, model: nn.Module) -> None:
        """Add c - c_k to the gradients."""
        for name, parameter in trainable_parameters(model).items():
            correction = self._correction[name]
            if parameter.grad is None:
                parameter.grad = correction.clone()
            else:
                parameter.grad += correction

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        """Update c_k; report K eta."""
        received = self._local.received
        updated = {
            name: c_k
            - self._c[name]
            + (on_device(model, received, name) - on_device(model, sent, name)) / result.lr_sum
            for name, c_k in self._c_k.items()
        }
        write_blocks(self._local.state, STATE, updated)
        return {"lr-sum": result.lr_sum}
