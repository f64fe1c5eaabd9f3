"""FedProto: federated prototype learning (Tan et al., AAAI 2022, arXiv 2105.00243)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.errors import ConfigError
from espalier.methods.tables import ClassTables
from espalier.models.families import family_models

if TYPE_CHECKING:
    from espalier.training.objectives import Objective


class FedProto(ClassTables):
    """Algorithm 1.

    Clients send the mean feature vector of each of their classes; the loss pulls a sample's features
    towards the mean over all clients that have its class.
    """

    name = "fedproto"
    kind = "prototype"

    def dimension(self) -> int:
        """Return the length of the features, which all models must share.

        Raises
        ------
        ConfigError
            If they do not.
        """
        from espalier.models.initial import feature_width

        s = self.settings
        widths = {
            name: feature_width(s.model_copy(update={"model": name}), self.image_shape, self.classes)
            for name in family_models(s.families or s.model)
        }
        if len(set(widths.values())) > 1:
            told = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise ConfigError(f"families: fedproto needs features of one length, these have {told}")
        return next(iter(widths.values()))

    def objective(self, round_: int) -> Objective:
        """Return the cross-entropy and the prototypes' term."""
        from espalier.training.knowledge import Prototypes

        return super().objective(round_) + Prototypes(self.settings.prototype_weight)
