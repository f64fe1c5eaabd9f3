"""Model-heterogeneous methods: the base of methods whose clients have networks of their own and exchange knowledge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from espalier import models
from espalier.config.fields import SettingsGroup
from espalier.config.run_settings import RunSettings
from espalier.methods.aggregate import Aggregate
from espalier.methods.base import CloudState, Deployed, Inquiry, Method, ServerState, Update
from espalier.methods.planning import Member
from espalier.methods.views import ClientView
from espalier.models.families import model_of
from espalier.models.presets import is_model
from espalier.seeds import seed_for
from espalier.wire.codec_registry import CodecSettings
from espalier.wire.sections import Layouts, Payload, SectionId
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from torch import nn

    from espalier.training.objectives import LocalRound

#: Architecture family of a network that a client builds and stores itself.
OWN = "own"
#: Prefix of the network in a client's state.
STATE = "own/"


class OwnModelSettings(SettingsGroup):
    """Which model each client trains."""

    families: str = Field(
        default="",
        description="clients' models in turn: a family (HtFE-img-8, …) or names separated by commas; empty: model",
    )


class OwnModels(Method):
    """Every client trains and stores a network of its own; servers hold no network.

    Client i, in the order of names, gets model i mod X of `families`, unless its owner chose one
    (`espalier client --model`). Its initial weights depend on the run's seed and its name.
    """

    tasks = ("classification",)
    has_one_model = False
    own_models = True
    sticky_edge = True
    extra_disclosure = "outputs of a network of its own on its images"

    @classmethod
    def contradictions(cls, settings: RunSettings) -> list[str]:
        """Refuse selections that compare networks, and codecs of weights."""
        faults = []
        if cls.chosen(settings, "selection") == "divfl":
            faults.append(f"selection: divfl compares gradients of one network; {cls.name} has many")
        if cls.chosen(settings, "codec") != "none":
            faults.append(f"codec: {cls.name} exchanges no weights to code; set codec=none")
        faults += [
            f"{key}: {cls.name} exchanges no weights to code; set {key}=none"
            for key, value in (
                ("downlink", settings.of(CodecSettings).downlink),
                ("edge-codec", settings.of(CodecSettings).edge_codec),
            )
            if value != "none"
        ]
        return faults

    # --- cloud ---------------------------------------------------------------------------------------

    def initial_state(self) -> CloudState:
        """Return a state without a network."""
        return CloudState(pb.ArchitectureSpec(), Payload({}))

    def assign(
        self, state: CloudState, picked: Sequence[str], members: Mapping[str, Member], round_: int
    ) -> dict[str, str]:
        """Return each client's model."""
        family = self.settings.of(OwnModelSettings).families or self.settings.model
        places = {name: i for i, name in enumerate(sorted(members))}
        return {name: members[name].model or model_of(family, places[name]) for name in picked}

    def view(self, state: CloudState, key: str) -> pb.View:
        """Return a client's model by name; each server adds the tensors it sends."""
        spec = pb.ArchitectureSpec(family=OWN)
        spec.config.update({"model": key.partition("@")[0]})
        return pb.View(architecture=spec)

    def cut(self, key: str, view: pb.View, server: ServerState) -> ClientView:
        """Return all tensors that a server holds for this client."""
        payload = server.payload.only(s for s in server.payload if self.is_for(key, s))
        return ClientView(view.architecture, payload, {}, ())

    def is_for(self, key: str, section: SectionId) -> bool:
        """Return whether a section is sent to a client."""
        return section.name not in self.server_sections

    def deployed(self, state: CloudState, ask: Inquiry) -> list[Deployed]:
        """Return an entry for clients only, which evaluate their own networks."""
        own = Deployed(
            "own models", state.architecture, state.weights, at_cloud=False, sections=state.payload
        )
        return [own]

    # --- client --------------------------------------------------------------------------------------

    def network(self, local: LocalRound, architecture: pb.ArchitectureSpec) -> nn.Module:
        """Return the client's own network from its state, or a new one."""
        name = architecture.config["model"] if "model" in architecture.config.keys() else ""  # noqa: SIM118 - a Struct
        if architecture.family != OWN or not isinstance(name, str) or not is_model(name):
            raise ValueError(f"a plan for the unknown model {name!r}")
        images = local.require_data()
        seed = seed_for(self.settings.seed, local.name, 0, "own model")
        settings = self.settings.model_copy(update={"model": name, "seed": seed})
        model = models.initial_model(settings, images.shape, len(images.classes))
        if stored := {n.removeprefix(STATE): a for n, a in local.state.items() if n.startswith(STATE)}:
            models.load_arrays(model, stored)
        local.architecture = models.describe(model)
        local.received = {n: t.detach().clone() for n, t in model.state_dict().items()}
        return model

    def publish(
        self, trained: dict[str, np.ndarray], local: LocalRound
    ) -> dict[SectionId, dict[str, np.ndarray]]:
        """Store the network in the client's state; nothing of it is sent."""
        local.state.update({STATE + name: array.copy() for name, array in trained.items()})
        return {}

    # --- servers -------------------------------------------------------------------------------------

    def reply_layouts(
        self, architecture: pb.ArchitectureSpec, sent: Layouts, names: Sequence[str], report: pb.ClientReport
    ) -> Layouts:
        """Return the sections of the knowledge that a client sends."""
        raise NotImplementedError

    def add(self, aggregate: Aggregate, update: Update, server: ServerState) -> None:
        """Add a client's knowledge; only `contribute` forwards tensors."""
        self.contribute(aggregate, update, server)
