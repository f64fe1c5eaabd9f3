"""Phoenix: federated diffusion on non-IID data (Stanley Jothiraj, Mashhadi 2023, arXiv 2306.04098)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from espalier.config.fields import Count, NonNegative, SettingsGroup
from espalier.data.imageset import to_uint8
from espalier.data.joined import with_pixels
from espalier.data.spec import open_data
from espalier.methods.aggregate import Aggregate, Arrays, Forwarded
from espalier.methods.base import CloudState, Inquiry, ServerState, Update
from espalier.methods.personal import SHARED, PersonalLayers
from espalier.methods.planning import Member
from espalier.methods.prefixes import matches
from espalier.seeds import rng_for
from espalier.wire.sections import MODEL, SectionId, layouts_to_proto
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from espalier.config.run_settings import RunSettings
    from espalier.data.imageset import ImageSet
    from espalier.training.objectives import LocalRound

#: Sections of the shared images, and of the loss limit.
HANDOUT, LIMIT = SectionId("handout"), SectionId("limit")
IMAGES, LABELS = "images", "labels"
#: Forwarded section: a client's loss, and whether it is excluded.
ABOUT = SectionId("about")
LOSS, LEFT_OUT = "loss", "left-out"
#: Section of `CloudState.memory`: the clients that have the shared images.
GIVEN = SectionId("given")
#: Prefix of the shared images in a client's state.
STATE_IMAGES = "handout/"
WITH_DATA = "shared+data"


class Phoenix(PersonalLayers):
    """FedAvg with three extensions for non-IID clients.

    Data sharing: every client receives the same small set of images once, and trains on them, too. Personal
    layers: those under `personal-layers` are not exchanged. Threshold filtering: a client whose loss exceeds
    `quality-threshold` times the previous window's median is excluded and reported by name.
    """

    class Settings(SettingsGroup):
        """Shared data, personal layers and the filter of clients."""

        cloud_only: ClassVar[frozenset[str]] = frozenset({"shared_data"})

        shared_data: str = Field(
            default="", description="data of which the cloud sends a part to every client"
        )
        shared_count: Count = Field(default=0, description="images of it that every client receives")
        personal_layers: str = Field(
            default="", description="prefixes of the tensors that never leave a client, separated by commas"
        )
        quality_threshold: NonNegative = Field(
            default=0.0,
            description="largest loss of a participant, as a multiple of the median; 0: no limit",
        )

    name = "phoenix"
    uses = (Settings,)
    tasks = ("diffusion",)
    server_sections = frozenset({LIMIT.name})
    extra_disclosure = "its loss, by which clients are filtered"

    @classmethod
    def contradictions(cls, settings: RunSettings) -> list[str]:
        """Refuse shared data of which no image is sent, and a moving average of an incomplete model."""
        faults = []
        # The reverse cannot be checked here: `shared-data` is a location at the cloud and is not sent.
        if settings.of(Phoenix.Settings).shared_data and not settings.of(Phoenix.Settings).shared_count:
            faults.append("shared-count: no image of shared-data is sent; set e.g. shared-count=100")
        if settings.ema_decay and settings.of(Phoenix.Settings).personal_layers:
            faults.append("ema-decay: with personal-layers the cloud has no whole model; set it to 0")
        return faults

    def is_personal(self, name: str) -> bool:
        """Return whether a tensor is under `personal-layers`."""
        return matches(name, self.settings.of(Phoenix.Settings).personal_layers)

    # --- the shared images ---------------------------------------------------------------------------

    def before_run(self, state: CloudState, ask: Inquiry) -> None:
        """Draw the images that all clients receive."""
        state.put({LIMIT: {LOSS: np.zeros(1)}})
        s = self.settings.of(Phoenix.Settings)
        if s.shared_data and s.shared_count:
            images = open_data(s.shared_data)
            count = min(s.shared_count, len(images))
            chosen = rng_for(self.settings.seed, "cloud", 0, "handout").choice(
                len(images), count, replace=False
            )
            pixels, labels = to_uint8(images.fetch(chosen)).numpy(), images.labels[chosen]
            state.put({HANDOUT: {IMAGES: pixels, LABELS: labels}})

    def assign(
        self, state: CloudState, picked: Sequence[str], members: Mapping[str, Member], round_: int
    ) -> dict[str, str]:
        """Return the shared tensors, with the images for clients that have not reported since they received them."""
        given = state.memory.get(GIVEN, {})
        missing = {n for n in picked if n not in given} if HANDOUT in state.payload else set()
        return {name: WITH_DATA if name in missing else SHARED for name in picked}

    def view(self, state: CloudState, key: str) -> pb.View:
        """Return the shared tensors, with or without the images."""
        layouts = {MODEL: self.shared(state.weights.layout)}
        if key == WITH_DATA:
            layouts[HANDOUT] = state.payload[HANDOUT].layout
        return pb.View(architecture=state.architecture, sections=layouts_to_proto(layouts))

    def data(self, local: LocalRound) -> ImageSet:
        """Return the client's own images and the shared ones."""
        own = super().data(local)
        sent = local.sections.get(HANDOUT, {})
        pixels, labels = (sent.get(n, local.state.get(STATE_IMAGES + n)) for n in (IMAGES, LABELS))
        if pixels is None or labels is None:
            return own
        return with_pixels(own, pixels, labels)

    def publish(
        self, trained: dict[str, np.ndarray], local: LocalRound
    ) -> dict[SectionId, dict[str, np.ndarray]]:
        """Store the personal tensors and the shared images."""
        shared = local.sections.get(HANDOUT, {})
        local.state.update({STATE_IMAGES + n: np.array(a) for n, a in shared.items()})
        return super().publish(trained, local)

    # --- the filter ----------------------------------------------------------------------------------

    def contribute(self, aggregate: Aggregate, update: Update, server: ServerState) -> None:
        """Add a client's tensors, unless its loss is above the limit."""
        loss, limit = update.metrics["loss"], float(server.section(LIMIT)[LOSS][0])
        left_out = 0 < limit < loss
        about = {LOSS: np.array([loss]), LEFT_OUT: np.array([left_out])}
        aggregate.forward(update.name, {ABOUT: about})
        if left_out:
            raise ValueError(f"its loss {loss:.4g} is above {limit:.4g}, so it is left out of this round")
        super().contribute(aggregate, update, server)

    def check_forwarded(self, forwarded: Mapping[str, Forwarded], rows: Arrays, server: ServerState) -> None:
        """Refuse a forwarded record without a finite loss or the exclusion flag."""
        super().check_forwarded(forwarded, rows, server)
        for client, sections in forwarded.items():
            about = sections.get(ABOUT, {})
            loss, left_out = about.get(LOSS), about.get(LEFT_OUT)
            if loss is None or loss.shape != (1,) or loss.dtype.kind != "f" or not np.isfinite(loss[0]):
                raise ValueError(f"a note on {client} without its loss")
            if left_out is None or left_out.shape != (1,) or left_out.dtype.kind != "b":
                raise ValueError(f"a note on {client} that does not say whether its update counts")

    def central_step(self, state: CloudState, aggregate: Aggregate) -> None:
        """Update the model, set the next limit, and record the clients that have the shared images."""
        super().central_step(state, aggregate)
        about = {client: sections[ABOUT] for client, sections in aggregate.forwarded.items()}
        losses = [float(note[LOSS][0]) for note in about.values()]
        if losses:  # an edge may have forwarded none
            limit = np.array([self.settings.of(Phoenix.Settings).quality_threshold * np.median(losses)])
            state.assign({LIMIT: {LOSS: limit}})
        # An excluded client's state, including the images, is rolled back to before the round.
        counted = {client: np.ones(1) for client, note in about.items() if not note[LEFT_OUT][0]}
        state.memory[GIVEN] = {**state.memory.get(GIVEN, {}), **counted}
