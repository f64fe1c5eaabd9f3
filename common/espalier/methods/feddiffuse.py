"""FedDiffuse: diffusion models exchanged in parts (de Goede et al. 2024, arXiv 2406.12575)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from espalier.config.fields import SettingsGroup
from espalier.methods.base import CloudState
from espalier.methods.personal import PersonalLayers
from espalier.methods.planning import Member
from espalier.seeds import rng_for
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from espalier.config.run_settings import RunSettings

#: Parts of the U-Net by prefixes of their tensors' names; the time embedding belongs to the encoder.
PARTS = {
    "down": ("conv_in", "time_proj", "time_embedding", "down_blocks"),
    "mid": ("mid_block",),
    "up": ("up_blocks", "conv_norm_out", "conv_out"),
}
#: Parts that stay on the clients, by `exchange`.
LOCAL = {"full": (), "usplit": (), "ulatdec": ("down",), "udec": ("down", "mid")}


class FedDiffuse(PersonalLayers):
    """The four exchange schemes of §3.

    FULL is FedAvg. USPLIT: participants are paired. All receive and train the whole network; one of a pair sends
    the encoder, the other the decoder, and one of them, at random, the bottleneck. Every part is averaged by
    samples over the clients that sent it. ULATDEC shares bottleneck and decoder, UDEC the decoder only; the rest
    stays on the clients.
    """

    class Settings(SettingsGroup):
        """What is exchanged."""

        exchange: Literal["full", "usplit", "ulatdec", "udec"] = Field(
            default="usplit", description="parts of the U-Net that cross the links"
        )

    name = "feddiffuse"
    uses = (Settings,)
    tasks = ("diffusion",)
    per_example_loss = True

    @classmethod
    def contradictions(cls, settings: RunSettings) -> list[str]:
        """Refuse a moving average of a network that the cloud does not have."""
        exchange = settings.of(FedDiffuse.Settings).exchange
        if settings.ema_decay and LOCAL[exchange]:
            return [f"ema-decay: with exchange={exchange} the cloud has no whole model; set it to 0"]
        return []

    def is_personal(self, name: str) -> bool:
        """Return whether a tensor belongs to a part that is not exchanged."""
        return part_of(name) in LOCAL[self.settings.of(FedDiffuse.Settings).exchange]

    def assign(
        self, state: CloudState, picked: Sequence[str], members: Mapping[str, Member], round_: int
    ) -> dict[str, str]:
        """Return the parts that each client sends, e.g. "down+mid"; a client without a partner sends all."""
        if self.settings.of(FedDiffuse.Settings).exchange != "usplit":
            return super().assign(state, picked, members, round_)
        rng = rng_for(self.settings.seed, "cloud", round_, "pairs")
        order = [sorted(picked)[i] for i in rng.permutation(len(picked))]
        sends: dict[str, str] = {}
        for a, b in zip(order[::2], order[1::2], strict=False):
            first = bool(rng.random() < 0.5)
            sends |= {a: "down+mid" if first else "down", b: "up" if first else "mid+up"}
        return dict.fromkeys(order, "down+mid+up") | sends

    def view(self, state: CloudState, key: str) -> pb.View:
        """Return the whole network, of which some parts are returned."""
        if self.settings.of(FedDiffuse.Settings).exchange != "usplit":
            return super().view(state, key)
        names = [t.name for t in state.architecture.tensors if part_of(t.name) in key.split("+")]
        return pb.View(architecture=state.architecture, returns=names)


def part_of(name: str) -> str:
    """Return "down", "mid" or "up" for a tensor of a U-Net."""
    return next((part for part, heads in PARTS.items() if name.startswith(heads)), "down")
