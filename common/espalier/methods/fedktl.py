"""FedKTL: knowledge transfer by a pre-trained generator (Zhang et al., CVPR 2024, arXiv 2403.15760)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from espalier.errors import ConfigError
from espalier.methods.base import CloudState, Inquiry, ServerState, Update
from espalier.methods.own_models import OwnModels
from espalier.methods.tables import table_in, table_layout, table_of
from espalier.methods.tally import Arrays, Tally
from espalier.seeds import seed_for
from espalier.wire.class_table import TOLERANCE
from espalier.wire.pairs import Pairs, to_pixels
from espalier.wire.payload import Layout, Weights
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from torch import nn

    from espalier.generators.base import Generator
    from espalier.training.objectives import Objective

log = logging.getLogger("espalier.cloud")

#: The authors' `clip-norm`. Gradients of ArcFace, whose scale is 64, have norms of 50 to 900 until it fits.
CLIP_NORM = 100.0
#: Keys of the feature transformer's tensors in `CloudState.extra`.
TRANSFORMER = "transformer/"


class FedKTL(OwnModels):
    """Algorithm 1.

    Clients classify by a fixed simplex ETF with ArcFace, and send the mean direction of each class, C
    numbers. The cloud's feature transformer F learns to put them where the generator's latents lie
    (MMD), near the mean Q_c of their class; the generator draws one image at each Q_c. From these pairs
    clients learn beside their own data: μ · MSE(h'(f(x_G)), Q).

    F is not linear, so edges stack the rows of their clients instead of adding them, without names and in
    an order that says nothing. Between its reports an edge gives its clients the pairs it has.
    """

    name = "fedktl"

    def before_run(self, state: CloudState, ask: Inquiry) -> None:
        """Open the generator, and say so where clipping leaves ArcFace little of its gradient."""
        self._open()
        if 0 < self.settings.clip_norm < CLIP_NORM / 10:
            log.warning(
                "fedktl: clip-norm=%g cuts most of ArcFace's gradient off, whose norm is 50 to 900; clients will "
                "learn far less than they could: set clip-norm=%g and learning-rate=0.01 as its authors have them",
                self.settings.clip_norm,
                CLIP_NORM,
            )

    def objective(self, round_: int) -> Objective:
        """Return ArcFace, the prototypes' measure and the generated pairs' term."""
        from espalier.training.transfer import ArcFace, KnowledgeTransfer, UnitPrototypes

        return ArcFace() + KnowledgeTransfer(self.settings.transfer_weight) + UnitPrototypes()

    def predictor(self, model: nn.Module, classes: int) -> nn.Module:
        """Return what answers with the cosines to the ETF's directions."""
        from torch import nn

        from espalier.training.transfer import EtfHead

        return nn.Sequential(model, EtfHead.of(classes, self.settings.seed))

    def describe_reply(self, objective: Objective, model: nn.Module, report: pb.ClientReport) -> None:
        """Say which classes the prototypes are of."""
        report.table.CopyFrom(table_of(objective).to_proto())

    def reply_layout(
        self, architecture: pb.ArchitectureSpec, sent: Layout, names: Sequence[str], report: pb.ClientReport
    ) -> Layout:
        """Return a prototype for each class that the report names; `contribute` knows how many there are."""
        return table_layout(report, (max(1, len(report.table.labels)), report.table.dimension))

    def contribute(self, tally: Tally, update: Update, server: ServerState) -> None:
        """Stack the rows."""
        classes = len(update.labels)
        table = table_in(update, "unit-prototype", classes, classes)
        tally.mean({}, 1.0)
        tally.rows({"labels": table.labels, "vectors": table.vectors})

    def check_passed(self, stacks: Mapping[str, Arrays], rows: Arrays, server: ServerState) -> None:
        """Refuse rows that are no prototypes of the run's classes."""
        super().check_passed(stacks, {}, server)
        if not rows:
            return
        labels, vectors = rows.get("labels"), rows.get("vectors")
        if set(rows) != {"labels", "vectors"} or labels is None or vectors is None:
            raise ValueError(f"rows {sorted(rows)[:3]}, labels and vectors are wanted")
        if labels.dtype != np.int64 or labels.ndim != 1 or ((labels < 0) | (labels >= self.classes)).any():
            raise ValueError("labels that are none of the run's classes")
        if vectors.dtype != np.float32 or vectors.shape != (len(labels), self.classes):
            raise ValueError(f"prototypes {vectors.dtype}{list(vectors.shape)} for {len(labels)} labels")
        if (np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1) > TOLERANCE).any():
            raise ValueError("a prototype that is not of norm 1")

    def step(self, server: ServerState, tally: Tally) -> None:
        """Leave the pairs as they are: an edge has no generator."""

    def central_step(self, state: CloudState, tally: Tally) -> None:
        """Train F, and draw one image per class."""
        import torch

        from espalier.training.alignment import FeatureTransformer, align

        rows = tally.stacked_rows()
        if not rows:
            return
        s, generator = self.settings, self._open()
        transformer = FeatureTransformer(self.classes, generator.latent_dim, s.seed)
        kept = {n.removeprefix(TRANSFORMER): a for n, a in state.extra.items() if n.startswith(TRANSFORMER)}
        if kept:
            transformer.load(kept)
        random = torch.Generator().manual_seed(seed_for(s.seed, "cloud", state.round, "alignment"))
        found = align(
            transformer,
            rows["vectors"],
            rows["labels"],
            generator.sample_latents,
            generator=random,
            weight=s.alignment_weight,
            epochs=s.alignment_epochs,
            rate=s.alignment_rate,
        )
        state.extra |= {TRANSFORMER + n: a for n, a in transformer.arrays().items()}
        if not len(found.labels):
            return
        state.notes |= {"alignment-mmd": found.mmd[-1], "alignment-mse": found.separability[-1]}
        channels, size, _ = self.image_shape
        images = generator.synthesise(torch.from_numpy(found.centroids), size, channels).numpy()
        drawn = to_pixels(images) if s.pair_pixels == "uint8" else images
        state.weights = Weights.pack(Pairs(drawn, found.centroids).arrays())

    def pictures(self, state: CloudState) -> np.ndarray | None:
        """Return the generated images."""
        pairs = Pairs.received(state.tensors, self.image_shape, "cloud")
        return None if pairs is None else pairs.floats()

    def _open(self) -> Generator:
        """Open the generator once."""
        from espalier.generators.base import open_generator

        s = self.settings
        if not s.generator:
            raise ConfigError(
                "generator: fedktl needs one; make it with `espalier pretrain-generator --data … --out DIR` and "
                "set generator=gan:DIR"
            )
        if not hasattr(self, "_generator"):
            self._generator = open_generator(
                s.generator,
                trust_pickle=s.trust_pickle,
                device=s.cloud_device,
                prompt=s.prompt,
                steps=s.generator_steps,
            )
        return self._generator
