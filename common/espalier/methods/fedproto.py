"""FedProto: federated prototype learning (Tan et al., AAAI 2022, arXiv 2105.00243)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from pydantic import Field

from espalier import lazy, models
from espalier.config.fields import NonNegative, SettingsGroup
from espalier.errors import ConfigError
from espalier.methods.class_tables import ClassTables, TableTerm, class_table
from espalier.methods.own_models import OwnModelSettings
from espalier.models.families import family_models
from espalier.training.forward_hooks import ForwardCapture, RunningMean, require_classifier
from espalier.training.objectives import LocalResult, LocalRound, Objective, TrainingError
from espalier.wire import class_table as tables
from espalier.wire.class_table import ClassTable

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn
else:
    torch = lazy.load("torch")


class FedProto(ClassTables):
    """Algorithm 1.

    Clients send the mean feature vector (prototype) of each of their classes; the local loss adds the distance of a
    sample's features to the mean prototype of its class over all clients.
    """

    class Settings(SettingsGroup):
        """The weight of the prototypes."""

        prototype_weight: NonNegative = Field(default=1.0, description="weight of the prototypes")

    name = "fedproto"
    uses = (Settings, OwnModelSettings)
    kind = "prototype"

    def dimension(self) -> int:
        """Return the length of the features, which must be the same for all models.

        Raises
        ------
        ConfigError
            If it is not.
        """
        s = self.settings
        widths = {
            name: models.feature_width(s.model_copy(update={"model": name}), self.image_shape, self.classes)
            for name in family_models(s.of(OwnModelSettings).families or s.model)
        }
        if len(set(widths.values())) > 1:
            lengths = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise ConfigError(f"families: fedproto needs features of one length, these have {lengths}")
        return next(iter(widths.values()))

    def objective(self, round_: int) -> Objective:
        """Return the cross-entropy and the distance to the prototypes."""
        return super().objective(round_) + PrototypeTerm(self.settings.of(FedProto.Settings).prototype_weight)


class PrototypeTerm(TableTerm):
    """``weight`` times the mean squared error between features and their class's global prototype.

    Features are the input of the last layers; their length is the same for all clients. The global prototype is
    the plain mean over all clients that hold the class; without one the term is 0. A client's prototypes are the
    mean features of its classes, computed in evaluation mode after training. The term uses the base loss's forward
    pass, so it comes after the base loss in the sum.

    Parameters
    ----------
    weight : float
        Weight of the term.
    """

    def __init__(self, weight: float) -> None:
        self._weight = weight
        self._features = ForwardCapture()

    def begin(self, model: nn.Module, local: LocalRound) -> None:
        """Read the global prototypes."""
        network = require_classifier(model, "FedProto")
        if not isinstance(network, models.Headed):
            raise TrainingError(f"FedProto has no features of a {type(model).__name__}; choose another model")
        self._model, self._local, self._table = model, local, None
        self._mean = RunningMean()
        self._global: tuple[Tensor, Tensor] | None = None
        common = local.sections.get(tables.TABLE, {})
        given = tables.given_table(common, tables.PROTOTYPE, network.classes, "the servers")
        if given is not None:
            device = next(model.parameters()).device
            vectors, counts = given.dense()
            self._global = torch.from_numpy(vectors).to(device), torch.from_numpy(counts > 0).to(device)
        self._features.attach(network.projection, inputs=True)

    _table: ClassTable | None = None

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """Return the term for the batch that the base loss just ran the network on."""
        features = cast("Tensor", self._features.take()).float()
        if self._global is None:
            return images.new_zeros(())
        vectors, held = self._global
        if vectors.shape[1] != features.shape[1]:
            raise TrainingError(
                f"this client's features have {features.shape[1]} values, the run's prototypes "
                f"{vectors.shape[1]}; give all clients models of one feature width"
            )
        squares = (features - vectors[labels]).square().mean(1)
        value = torch.where(held[labels], squares, 0.0).mean()
        self._mean.add(value)
        return self._weight * value

    def table(self) -> ClassTable:
        """Return the mean features by class of the trained network, computed once per round."""
        if self._table is None:
            network = cast("models.Classifier", self._model)
            self._table = class_table(tables.PROTOTYPE, network, network.features, self._local)
        return self._table

    def end(self, model: nn.Module, result: LocalResult, sent: Mapping[str, Tensor]) -> dict[str, float]:
        """Report the term."""
        self._features.release()
        return self._mean.report("prototype-loss")
