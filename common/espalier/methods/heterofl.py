"""HeteroFL: sub-models of different width (Diao, Ding, Tarokh, ICLR 2021, arXiv 2010.01264)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from espalier import models
from espalier.config.fields import SettingsGroup
from espalier.methods.aggregate import Aggregate
from espalier.methods.base import CloudState, Deployed, Inquiry, ServerState, Update
from espalier.methods.levels import LevelSettings
from espalier.methods.submodels import SubModels, sliced
from espalier.models.presets import is_output_tensor
from espalier.tasks.classification import CrossEntropy, MaskedCrossEntropy
from espalier.training.objectives import Objective
from espalier.training.privacy import PrivacySettings
from espalier.wire.payload import Weights
from espalier.wire.sections import MODEL, Payload

if TYPE_CHECKING:
    from torch import Tensor, nn

    from espalier.config.run_settings import RunSettings
    from espalier.methods.selection import Answer
    from espalier_proto import espalier_pb2 as pb


class HeteroFL(SubModels):
    """Algorithm 1.

    A client of rate r trains the first ⌈r·h⌉ of every h hidden units. A coordinate becomes the plain mean over the
    clients that hold it; of the output layer a client holds only the rows of its own labels, because the masked
    loss sets the logits of other labels to 0. Narrow layers are scaled by 1/r in training (Scaler). Batch
    normalisation has no running statistics in training (sBN): before an evaluation every client passes its images
    through the global network once, and the statistics of the batches are averaged.
    """

    class Settings(SettingsGroup):
        """How narrow networks are trained."""

        masked_loss: bool = Field(default=True, description="leave out the labels that a client lacks")
        width_scaler: bool = Field(default=True, description="scale a narrow layer's output in training")

    name = "heterofl"
    uses = (Settings, LevelSettings)
    own_weighting = "uniform"
    per_example_loss = True

    @classmethod
    def contradictions(cls, settings: RunSettings) -> list[str]:
        """Refuse label noise and DP-SGD with the masked loss, which needs the true label sets."""
        private = settings.of(PrivacySettings)
        wanted = {"histogram-epsilon": private.histogram_epsilon > 0, "dp-sgd-noise": private.dp_sgd}
        return [
            f"{key}: heterofl's masked loss needs true label sets; set masked-loss=false"
            for key, on in wanted.items()
            if on and settings.of(HeteroFL.Settings).masked_loss
        ]

    def initial(self, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return the network with static batch normalisation."""
        model = super().initial(image_shape, classes)
        spec = models.with_norm(models.describe(model), "static")
        own: dict[str, Tensor] = model.state_dict()
        return models.build_with(spec, {t.name: own[t.name] for t in spec.tensors})

    def variant(self, architecture: pb.ArchitectureSpec, level: float) -> pb.ArchitectureSpec:
        """Return the network of a rate."""
        return models.narrowed(architecture, level, scaler=self.settings.of(HeteroFL.Settings).width_scaler)

    def objective(self, round_: int) -> Objective:
        """Return the cross-entropy over a client's own labels."""
        return MaskedCrossEntropy() if self.settings.of(HeteroFL.Settings).masked_loss else CrossEntropy()

    def contribute(self, aggregate: Aggregate, update: Update, server: ServerState) -> None:
        """Add the client's tensors; of the output layer, the rows of its labels."""
        own = update.labels > 0
        masked = self.settings.of(HeteroFL.Settings).masked_loss
        output = [n for n in update.sections[MODEL] if masked and is_output_tensor(n)]
        aggregate.mean(update.sections, self.weight_of(update), rows={MODEL: dict.fromkeys(output, own)})

    def deployed(self, state: CloudState, ask: Inquiry) -> list[Deployed]:
        """Return the networks with the clients' statistics (sBN)."""
        found = []
        for network in super().deployed(state, ask):
            weights = sliced(network.weights, network.architecture)
            statistics = merged(ask("statistics", network.architecture, Payload.of(weights), None))
            if statistics:
                tensors = {n: models.to_tensor(a) for n, a in weights.views().items()}
                model = models.with_statistics(models.build_with(network.architecture, tensors), statistics)
                spec, weights = models.describe(model), Weights.pack(models.model_arrays(model))
                network = Deployed(network.label, spec, weights, at_clients=network.at_clients)
            found.append(network)
        return found


def merged(answers: dict[str, Answer]) -> dict[str, models.Statistics]:
    """Return the clients' mean statistics, weighted by batches: those of one pass over all batches."""
    sums: dict[str, list[np.ndarray]] = {}
    for _, answer in sorted(answers.items()):
        for path in {name.rpartition(".")[0] for name in answer.arrays}:
            mean, var, count = (answer.arrays[f"{path}.{part}"] for part in ("mean", "var", "count"))
            total = sums.setdefault(path, [np.zeros(mean.shape), np.zeros(mean.shape), np.zeros(())])
            for part, value in zip(total, (mean * count, var * count, count), strict=True):
                part += value
    # A layer without statistics of any batch (one value per channel) stays the identity.
    return {
        path: models.Statistics(
            (mean / max(n, 1)).astype(np.float32),
            (var / n if n else np.ones_like(var)).astype(np.float32),
            int(n),
        )
        for path, (mean, var, n) in sums.items()
    }
