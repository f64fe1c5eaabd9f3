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
from espalier.methods.base import CloudState, Inquiry, ServerState, Update
from espalier.methods.personal import SHARED, PersonalLayers
from espalier.methods.planning import Member
from espalier.methods.prefixes import matches
from espalier.methods.tally import Arrays, Tally
from espalier.seeds import rng_for
from espalier.wire.payload import Weights
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from espalier.config.run_settings import RunSettings
    from espalier.data.imageset import ImageSet
    from espalier.training.objectives import LocalRound

#: Sections of the shared images, of the loss limit, and of a client's forwarded loss; keys of clients with the images.
IMAGES, LABELS, LIMIT, LOSS, LEFT_OUT, GIVEN = (
    "handout/images",
    "handout/labels",
    "limit/loss",
    "about/loss",
    "about/left-out",
    "given/",
)
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
    server_sections = frozenset({"limit"})
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
        further: dict[str, np.ndarray] = {LIMIT: np.zeros(1)}
        s = self.settings.of(Phoenix.Settings)
        if s.shared_data and s.shared_count:
            images = open_data(s.shared_data)
            count = min(s.shared_count, len(images))
            chosen = rng_for(self.settings.seed, "cloud", 0, "handout").choice(
                len(images), count, replace=False
            )
            further[IMAGES] = to_uint8(images.fetch(chosen)).numpy()
            further[LABELS] = images.labels[chosen]
        state.weights = Weights.pack(state.tensors | further)

    def assign(
        self, state: CloudState, picked: Sequence[str], members: Mapping[str, Member], round_: int
    ) -> dict[str, str]:
        """Return the shared tensors, with the images for clients that have not reported since they received them."""
        missing = (
            set() if IMAGES not in state.tensors else {n for n in picked if GIVEN + n not in state.extra}
        )
        return {name: WITH_DATA if name in missing else SHARED for name in picked}

    def view(self, state: CloudState, key: str) -> pb.View:
        """Return the shared tensors, with or without the images."""
        layout = state.weights.layout
        names = [n for n in layout.names if "/" not in n and not self.is_personal(n)]
        if key == WITH_DATA:
            names += [IMAGES, LABELS]
        return pb.View(architecture=state.architecture, layout=layout.only(names).to_proto())

    def data(self, local: LocalRound) -> ImageSet:
        """Return the client's own images and the shared ones."""
        own = super().data(local)
        pixels, labels = (local.aux.get(n, local.state.get(n)) for n in (IMAGES, LABELS))
        if pixels is None or labels is None:
            return own
        return with_pixels(own, pixels, labels)

    def publish(self, trained: dict[str, np.ndarray], local: LocalRound) -> dict[str, np.ndarray]:
        """Store the personal tensors and the shared images."""
        local.state.update({n: np.array(local.aux[n]) for n in (IMAGES, LABELS) if n in local.aux})
        return super().publish(trained, local)

    # --- the filter ----------------------------------------------------------------------------------

    def contribute(self, tally: Tally, update: Update, server: ServerState) -> None:
        """Add a client's tensors, unless its loss is above the limit."""
        loss, limit = update.metrics["loss"], float(server.tensors[LIMIT][0])
        left_out = 0 < limit < loss
        tally.forward(update.name, {LOSS: np.array([loss]), LEFT_OUT: np.array([left_out])})
        if left_out:
            raise ValueError(f"its loss {loss:.4g} is above {limit:.4g}, so it is left out of this round")
        super().contribute(tally, update, server)

    def check_passed(self, stacks: Mapping[str, Arrays], rows: Arrays, server: ServerState) -> None:
        """Refuse a forwarded record without a finite loss or the exclusion flag."""
        super().check_passed(stacks, rows, server)
        for client, stack in stacks.items():
            loss, left_out = stack.get(LOSS), stack.get(LEFT_OUT)
            if loss is None or loss.shape != (1,) or loss.dtype.kind != "f" or not np.isfinite(loss[0]):
                raise ValueError(f"a note on {client} without its loss")
            if left_out is None or left_out.shape != (1,) or left_out.dtype.kind != "b":
                raise ValueError(f"a note on {client} that does not say whether its update counts")

    def central_step(self, state: CloudState, tally: Tally) -> None:
        """Update the model, set the next limit, and record the clients that have the shared images."""
        super().central_step(state, tally)
        losses = [float(stack[LOSS][0]) for stack in tally.stacks.values()]
        if losses:  # an edge may have forwarded none
            state.assign(
                {LIMIT: np.array([self.settings.of(Phoenix.Settings).quality_threshold * np.median(losses)])}
            )
        # An excluded client's state, including the images, is rolled back to before the round.
        counted = (client for client, stack in tally.stacks.items() if not stack[LEFT_OUT][0])
        state.extra |= {GIVEN + client: np.ones(1) for client in counted}
