"""What a server sends, on the link: the network's tensors in half precision where the run says so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from flwr.app import Message

from espalier.config.run_settings import RunSettings
from espalier.errors import WireError
from espalier.wire import control
from espalier.wire.codec import Codec, CodecSettings, create_codec
from espalier.wire.payload import Layout, Weights, fault_of
from espalier_proto import espalier_pb2 as pb


class SentForm:
    """How a server's tensors lie on the link: sender and receiver both derive it from the plan.

    Only trained float32 tensors of the plan's network are coded; statistics, counters and the sections of a
    method travel as they are. The sender keeps its own numbers whole: each rounding is of those, so none adds to the
    one before.

    Parameters
    ----------
    layout : Layout
        The tensors before coding.
    architecture : pb.ArchitectureSpec
        The network that is sent.
    settings : RunSettings
        The run's; `downlink` names the codec.
    """

    def __init__(self, layout: Layout, architecture: pb.ArchitectureSpec, settings: RunSettings) -> None:
        self._codec: Codec | None = None
        self._layout, self._coded, self.wire = layout, Layout(()), layout
        downlink = settings.of(CodecSettings).downlink
        if downlink == "none":
            return
        trained = {t.name for t in architecture.tensors if not t.buffer}
        self._codec = create_codec(settings, downlink)
        self._coded = Layout(tuple(t for t in layout.tensors if t.name in trained and t.dtype == "float32"))
        narrow = {t.name: t for t in self._codec.layout(self._coded).tensors}
        self.wire = Layout(tuple(narrow.get(t.name, t) for t in layout.tensors))

    def encode(self, weights: Weights) -> tuple[Weights, Weights]:
        """Return the payload, and the tensors as its receivers will read them.

        Raises
        ------
        CodecError
            If a number is not finite.
        """
        if self._codec is None:
            return weights, weights
        if weights.link is not None and weights.link.layout == self.wire:
            return weights.link, weights  # rounding what was rounded before gives the same bits
        views, payload, coded = weights.views(), Weights.blank(self.wire), set(self._coded.names)
        into = payload.views()
        # Rounding to nearest draws nothing from the generator.
        rng = np.random.default_rng(0)
        self._codec.encode({n: views[n] for n in coded}, rng, {n: into[n] for n in coded})
        for name in into.keys() - coded:
            np.copyto(into[name], views[name], casting="no")
        return payload.frozen(), self.decode(payload, "this server")

    def decode(self, payload: Weights, sender: str) -> Weights:
        """Return the tensors; raises WireError where a code makes no sense, or stands for what cannot be added up."""
        if self._codec is None:
            return payload
        came = payload.views()
        found = Weights.empty(self._layout)
        into = found.views()
        coded = {n: into[n] for n in self._coded.names}
        self._codec.decode({n: came[n] for n in coded}, self._coded, sender, coded)
        for name, array in coded.items() if not self._codec.bounded else ():
            if fault := fault_of(array):
                raise WireError(sender, f"tensor {name!r} comes to {fault}")
        for name, array in into.items():
            if name not in coded:
                np.copyto(array, came[name], casting="no")
        return found


def read_sent(
    message: Message,
    plan: pb.WindowPlan | pb.RoundPlan,
    settings: RunSettings,
    sender: str,
    *,
    send_on: bool = False,
) -> Weights:
    """Read the tensors that came with a plan.

    Parameters
    ----------
    message : Message
        What came.
    plan : pb.WindowPlan or pb.RoundPlan
        The plan in it.
    settings : RunSettings
        The run's.
    sender : str
        Whom an error names.
    send_on : bool
        Whether they will be sent on: then what came is kept beside them.

    Raises
    ------
    WireError
        Naming the sender, if they are not what the plan says.
    """
    form = SentForm(control.plan_layout(plan, sender), plan.architecture, settings)
    payload = control.read_weights(message, form.wire, sender)
    found = form.decode(payload, sender)
    return replace(found, link=payload) if send_on and found is not payload else found
