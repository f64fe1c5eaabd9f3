"""HeteroFL: sub-models of different width (Diao, Ding, Tarokh, ICLR 2021, arXiv 2010.01264)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from espalier.methods.base import CloudState, Deployed, Inquiry, ServerState, Update
from espalier.methods.submodels import SubModels, sliced
from espalier.methods.tally import Tally
from espalier.models.presets import is_output_tensor
from espalier.wire.payload import Weights

if TYPE_CHECKING:
    from torch import nn

    from espalier.config.run_config import RunConfig
    from espalier.methods.selection import Answer
    from espalier.models.statistics import Statistics
    from espalier.training.objectives import Objective
    from espalier_proto import espalier_pb2 as pb


class HeteroFL(SubModels):
    """Algorithm 1.

    A client of rate r trains the first ⌈r·h⌉ of every h hidden units. A coordinate becomes the plain
    mean over the clients that hold it; of the output layer a client holds only the rows of its own
    labels, because the masked loss leaves the others' logits at 0. Narrow layers are scaled by 1/r in
    training (Scaler). Batch normalisation keeps no statistics in training (sBN): before an
    evaluation every client passes its images through the global network once, and the batches'
    statistics are averaged.
    """

    name = "heterofl"
    own_weighting = "uniform"
    sample_wise = True

    @classmethod
    def contradictions(cls, settings: RunConfig) -> list[str]:
        """Refuse noise where the labels a client holds decide what it trains."""
        wanted = {"histogram-epsilon": settings.histogram_epsilon > 0, "dp-sgd-noise": settings.dp_sgd}
        return [
            f"{key}: heterofl's masked loss needs true label sets; set masked-loss=false"
            for key, on in wanted.items()
            if on and settings.masked_loss
        ]

    def initial(self, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return the network, its normalisation static."""
        import torch

        from espalier.models.architecture import build_with, describe
        from espalier.models.variants import with_norm

        model = super().initial(image_shape, classes)
        spec = with_norm(describe(model), "static")
        own: dict[str, torch.Tensor] = model.state_dict()
        return build_with(spec, {t.name: own[t.name] for t in spec.tensors})

    def variant(self, architecture: pb.ArchitectureSpec, level: float) -> pb.ArchitectureSpec:
        """Return the network of a rate."""
        from espalier.models.variants import narrowed

        return narrowed(architecture, level, scaler=self.settings.width_scaler)

    def objective(self, round_: int) -> Objective:
        """Return the cross-entropy over a client's own labels."""
        from espalier.tasks.classification import CrossEntropy, MaskedCrossEntropy

        return MaskedCrossEntropy() if self.settings.masked_loss else CrossEntropy()

    def contribute(self, tally: Tally, update: Update, server: ServerState) -> None:
        """Add what the client holds; of the output layer, the rows of its labels."""
        own = update.labels > 0
        output = [n for n in update.arrays if self.settings.masked_loss and is_output_tensor(n)]
        tally.mean(update.arrays, self.weight_of(update), rows=dict.fromkeys(output, own))

    def deployed(self, state: CloudState, ask: Inquiry) -> list[Deployed]:
        """Return the networks with the clients' statistics (sBN)."""
        from espalier.models.architecture import build_with, describe
        from espalier.models.arrays import model_arrays, to_tensor
        from espalier.models.statistics import with_statistics

        found = []
        for network in super().deployed(state, ask):
            weights = sliced(network.weights, network.architecture)
            statistics = merged(ask("statistics", network.architecture, weights, None))
            if statistics:
                model = build_with(
                    network.architecture, {n: to_tensor(a) for n, a in weights.views().items()}
                )
                ready = with_statistics(model, statistics)
                spec, weights = describe(ready), Weights.pack(model_arrays(ready))
                network = Deployed(network.label, spec, weights, at_clients=network.at_clients)
            found.append(network)
        return found


def merged(answers: dict[str, Answer]) -> dict[str, Statistics]:
    """Return the batch-count-weighted mean of the clients' statistics: what one pass over all batches gives."""
    from espalier.models.statistics import Statistics

    sums: dict[str, list[np.ndarray]] = {}
    for _, answer in sorted(answers.items()):
        for path in {name.rpartition(".")[0] for name in answer.arrays}:
            mean, var, count = (answer.arrays[f"{path}.{part}"] for part in ("mean", "var", "count"))
            total = sums.setdefault(path, [np.zeros(mean.shape), np.zeros(mean.shape), np.zeros(())])
            for part, value in zip(total, (mean * count, var * count, count), strict=True):
                part += value
    # A layer of which no batch had a statistic (one value a channel) stays the identity.
    return {
        path: Statistics(
            (mean / max(n, 1)).astype(np.float32),
            (var / n if n else np.ones_like(var)).astype(np.float32),
            int(n),
        )
        for path, (mean, var, n) in sums.items()
    }
