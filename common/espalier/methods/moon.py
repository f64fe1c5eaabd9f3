"""MOON: model-contrastive federated learning (Li, He, Song, CVPR 2021, arXiv 2103.16257)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from espalier.methods.base import CloudState, Inquiry, Method
from espalier.models.presets import task_of
from espalier.wire.payload import Layout, Weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from espalier.training.objectives import Objective

#: Outputs of the projection head (the authors' code).
PROJECTION = 256
SECTION = "head"


class MOON(Method):
    """Algorithm 1: the loss carries −log of how much nearer z is to the global model's than to the former's.

    A classifier lies on top of its projection head, as the paper has it. A U-Net has no such place:
    its pooled mid-block features go through a head of their own, which is averaged like the network.
    """

    name = "moon"
    settled = True

    def initial(self, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return the network; a classifier's with a projection head."""
        from espalier.models.initial import initial_model

        classifies = task_of(self.settings.model) == "classification"
        return initial_model(self.settings, image_shape, classes, projection=PROJECTION if classifies else 0)

    def before_run(self, state: CloudState, ask: Inquiry) -> None:
        """Put a projection head beside a U-Net."""
        if task_of(self.settings.model) == "diffusion":
            from espalier.training.contrastive import initial_head, mid_width

            head = initial_head(mid_width(state.model()), self.settings.seed)
            state.weights = Weights.pack(state.tensors | head)

    def objective(self, round_: int) -> Objective:
        """Return the task's loss and the contrastive term."""
        from espalier.training.contrastive import Contrastive

        s = self.settings
        return super().objective(round_) + Contrastive(s.moon_mu, s.moon_temperature)

    def returned(self, sent: Layout, names: Sequence[str], metrics: Mapping[str, float]) -> Layout:
        """Return the network's tensors and the head's."""
        return sent.only([*names, *(n for n in sent.names if n.startswith(SECTION + "/"))])
