"""FedKTL: knowledge transfer by a pre-trained generator (Zhang et al., CVPR 2024, arXiv 2403.15760)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from espalier import lazy
from espalier.config.fields import NonNegative, Positive, PositiveInt, SettingsGroup
from espalier.errors import ConfigError
from espalier.generators.base import (
    DenoisingSettings,
    GeneratorSettings,
    PromptSettings,
    TrustSettings,
    open_generator,
)
from espalier.methods.aggregate import Aggregate, Arrays, Forwarded
from espalier.methods.base import CloudState, Inquiry, ServerState, Update
from espalier.methods.class_tables import table_in, table_layout, table_of
from espalier.methods.own_models import OwnModels, OwnModelSettings
from espalier.seeds import seed_for
from espalier.training.objectives import Objective
from espalier.wire.class_table import REPLY, TOLERANCE
from espalier.wire.pairs import PAIRS, Pairs, to_pixels
from espalier.wire.sections import Layouts, SectionId
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    import torch
    from torch import nn

    from espalier.generators.base import Generator
    from espalier.methods.fedktl import alignment, client
else:
    torch, nn = lazy.load("torch"), lazy.load("torch.nn")
    client = lazy.load("espalier.methods.fedktl.client")
    alignment = lazy.load("espalier.methods.fedktl.alignment")

log = logging.getLogger("espalier.cloud")

#: `clip-norm` of the authors' code. ArcFace's scale of 64 gives gradients with norms of 50 to 900 early in training.
CLIP_NORM = 100.0
#: Section of the feature transformer's tensors in `CloudState.memory`.
TRANSFORMER = SectionId("transformer")


class FedKTL(OwnModels):
    """Algorithm 1.

    Clients classify with a fixed simplex ETF and ArcFace, and send the mean direction (prototype) of each class, C
    numbers. The cloud trains a feature transformer F that maps prototypes to the distribution of the generator's
    latents (MMD), close to the mean Q_c of their class; the generator draws one image from each Q_c. Clients train
    on these pairs in addition to their own data: μ · MSE(h'(f(x_G)), Q).

    F is not linear, so edges stack the rows of their clients instead of adding them, without names and sorted by their
    values. Between its reports an edge sends its clients its current pairs.
    """

    class Settings(SettingsGroup):
        """The transfer to clients and the alignment at the cloud."""

        transfer_weight: NonNegative = Field(default=50.0, description="weight mu of the generated pairs")
        alignment_weight: NonNegative = Field(default=1.0, description="weight lambda of the centroids")
        alignment_epochs: PositiveInt = Field(
            default=100, description="epochs of training the cloud's feature transformer"
        )
        alignment_rate: Positive = Field(default=0.01, description="step size of training it (Adam)")
        pair_pixels: Literal["uint8", "float32"] = Field(
            default="uint8", description="how generated images cross the links"
        )

    name = "fedktl"
    uses = (Settings, GeneratorSettings, OwnModelSettings)

    def before_run(self, state: CloudState, ask: Inquiry) -> None:
        """Open the generator; warn if `clip-norm` would cut off most of ArcFace's gradient."""
        self._open()
        if 0 < self.settings.clip_norm < CLIP_NORM / 10:
            log.warning(
                "fedktl: clip-norm=%g cuts off most of ArcFace's gradient, whose norm is 50 to 900, and slows training "
                "down; set clip-norm=%g and learning-rate=0.01 as in the authors' code",
                self.settings.clip_norm,
                CLIP_NORM,
            )

    def objective(self, round_: int) -> Objective:
        """Return ArcFace, the transfer task and the prototypes."""
        transfer = client.KnowledgeTransfer(self.settings.of(FedKTL.Settings).transfer_weight)
        return client.ArcFace() + transfer + client.UnitPrototypes()

    def predictor(self, model: nn.Module, classes: int) -> nn.Module:
        """Return the network that outputs the cosines with the ETF's vectors."""
        return nn.Sequential(model, client.EtfHead.of(classes, self.settings.seed))

    def describe_reply(self, objective: Objective, model: nn.Module, report: pb.ClientReport) -> None:
        """Report the classes of the prototypes."""
        report.table.CopyFrom(table_of(objective).to_proto())

    def reply_layouts(
        self, architecture: pb.ArchitectureSpec, sent: Layouts, names: Sequence[str], report: pb.ClientReport
    ) -> Layouts:
        """Return the layout of a prototype for each class of the report; `contribute` checks their number."""
        return {REPLY: table_layout(report, (max(1, len(report.table.labels)), report.table.dimension))}

    def contribute(self, aggregate: Aggregate, update: Update, server: ServerState) -> None:
        """Stack the rows."""
        classes = len(update.labels)
        table = table_in(update, "unit-prototype", classes, classes)
        aggregate.mean({}, 1.0)
        aggregate.rows({"labels": table.labels, "vectors": table.vectors})

    def check_forwarded(self, forwarded: Mapping[str, Forwarded], rows: Arrays, server: ServerState) -> None:
        """Refuse rows that are not prototypes of the run's classes."""
        super().check_forwarded(forwarded, {}, server)
        if not rows:
            return
        labels, vectors = rows.get("labels"), rows.get("vectors")
        if set(rows) != {"labels", "vectors"} or labels is None or vectors is None:
            raise ValueError(f"rows {sorted(rows)[:3]}, expected labels and vectors")
        if labels.dtype != np.int64 or labels.ndim != 1 or ((labels < 0) | (labels >= self.classes)).any():
            raise ValueError("labels outside the run's classes")
        if vectors.dtype != np.float32 or vectors.shape != (len(labels), self.classes):
            raise ValueError(f"prototypes {vectors.dtype}{list(vectors.shape)} for {len(labels)} labels")
        if (np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1) > TOLERANCE).any():
            raise ValueError("a prototype that is not of norm 1")

    def step(self, server: ServerState, aggregate: Aggregate) -> None:
        """Do nothing: an edge has no generator, so its pairs do not change."""

    def central_step(self, state: CloudState, aggregate: Aggregate) -> None:
        """Train F, and draw one image per class."""
        rows = aggregate.stacked_rows()
        if not rows:
            return
        s, seed, generator = self.settings.of(FedKTL.Settings), self.settings.seed, self._open()
        transformer = alignment.FeatureTransformer(self.classes, generator.latent_dim, seed)
        if TRANSFORMER in state.memory:
            transformer.load(state.memory[TRANSFORMER])
        random = torch.Generator().manual_seed(seed_for(seed, "cloud", state.round, "alignment"))
        found = alignment.align(
            transformer,
            rows["vectors"],
            rows["labels"],
            generator.sample_latents,
            generator=random,
            weight=s.alignment_weight,
            epochs=s.alignment_epochs,
            rate=s.alignment_rate,
        )
        state.memory[TRANSFORMER] = dict(transformer.arrays())
        if not len(found.labels):
            return
        state.notes |= {"alignment-mmd": found.mmd[-1], "alignment-mse": found.separability[-1]}
        channels, size, _ = self.image_shape
        images = generator.synthesise(torch.from_numpy(found.centroids), size, channels).numpy()
        drawn = to_pixels(images) if s.pair_pixels == "uint8" else images
        state.put({PAIRS: Pairs(drawn, found.centroids).arrays()})

    def pictures(self, state: CloudState) -> np.ndarray | None:
        """Return the generated images."""
        pairs = Pairs.received(state.section(PAIRS), self.image_shape, "cloud")
        return None if pairs is None else pairs.floats()

    def _open(self) -> Generator:
        """Open the generator once."""
        s = self.settings
        named = s.of(GeneratorSettings).generator
        if not named:
            raise ConfigError(
                "generator: fedktl needs one; make it with `espalier pretrain-generator --data … --out DIR` and "
                "set generator=gan:DIR"
            )
        if not hasattr(self, "_generator"):
            self._generator = open_generator(
                named,
                trust_pickle=s.of(TrustSettings).trust_pickle,
                device=s.cloud_device,
                prompt=s.of(PromptSettings).prompt,
                steps=s.of(DenoisingSettings).generator_steps,
            )
        return self._generator
