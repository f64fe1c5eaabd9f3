"""Encoding of payloads from servers to edges and clients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from flwr.app import Message

from espalier.config.run_settings import RunSettings
from espalier.errors import WireError
from espalier.wire import control
from espalier.wire.codec import Codec
from espalier.wire.codec_registry import CodecSettings, create_codec
from espalier.wire.payload import Layout, Weights, fault_of
from espalier.wire.sections import MODEL, Layouts, Payload
from espalier_proto import espalier_pb2 as pb


class DownlinkEncoding:
    """The encoding of a server's tensors; sender and receiver both derive it from the plan.

    Only trained float32 tensors of the plan's network are coded; statistics, counters and a method's sections are
    sent unchanged. The sender rounds its own full-precision values each time, so rounding errors do not
    accumulate.

    Parameters
    ----------
    layouts : mapping of SectionId to Layout
        The sections before coding.
    architecture : pb.ArchitectureSpec
        The network that the plan describes.
    settings : RunSettings
        The run's settings; `downlink` names the codec.
    """

    def __init__(self, layouts: Layouts, architecture: pb.ArchitectureSpec, settings: RunSettings) -> None:
        self._codec: Codec | None = None
        self._coded, self.wire = Layout(()), dict(layouts)
        self._layout = layouts.get(MODEL, Layout(()))
        downlink = settings.of(CodecSettings).downlink
        if downlink == "none" or MODEL not in layouts:
            return
        trained = {t.name for t in architecture.tensors if not t.buffer}
        self._codec = create_codec(settings, downlink)
        self._coded = Layout(
            tuple(t for t in self._layout.tensors if t.name in trained and t.dtype == "float32")
        )
        narrow = {t.name: t for t in self._codec.layout(self._coded).tensors}
        self.wire[MODEL] = Layout(tuple(narrow.get(t.name, t) for t in self._layout.tensors))

    def encode(self, payload: Payload) -> tuple[Payload, Payload]:
        """Return the payload to send, and the tensors as the receivers will decode them.

        Raises
        ------
        CodecError
            If a value is not finite.
        """
        if self._codec is None:
            return payload, payload
        model = payload[MODEL]
        if model.link is not None and model.link.layout == self.wire[MODEL]:
            # The values are rounded already; rounding them again would give the same bits.
            return payload.replaced({MODEL: model.link}), payload
        views, coded, names = model.views(), Weights.blank(self.wire[MODEL]), set(self._coded.names)
        into = coded.views()
        # Rounding to nearest draws nothing from the generator.
        rng = np.random.default_rng(0)
        self._codec.encode({n: views[n] for n in names}, rng, {n: into[n] for n in names})
        for name in into.keys() - names:
            np.copyto(into[name], views[name], casting="no")
        sent = payload.replaced({MODEL: coded.frozen()})
        return sent, payload.replaced({MODEL: self._decode(sent[MODEL], "this server")})

    def decode(self, payload: Payload, sender: str) -> Payload:
        """Return the tensors as they were before coding, up to rounding.

        Raises
        ------
        WireError
            If a code is invalid, or decodes to a value that `fault_of` rejects.
        """
        if self._codec is None:
            return payload
        return payload.replaced({MODEL: self._decode(payload[MODEL], sender)})

    def _decode(self, model: Weights, sender: str) -> Weights:
        assert self._codec is not None
        encoded = model.views()
        found = Weights.empty(self._layout)
        into = found.views()
        coded = {n: into[n] for n in self._coded.names}
        self._codec.decode({n: encoded[n] for n in coded}, self._coded, sender, coded)
        for name, array in coded.items() if not self._codec.bounded else ():
            if fault := fault_of(array):
                raise WireError(sender, f"tensor {name!r} decodes to {fault}")
        for name, array in into.items():
            if name not in coded:
                np.copyto(array, encoded[name], casting="no")
        return found


def read_downlink(
    message: Message,
    plan: pb.WindowPlan | pb.RoundPlan,
    settings: RunSettings,
    sender: str,
    *,
    send_on: bool = False,
) -> Payload:
    """Read the payload of a message that carries a plan.

    Parameters
    ----------
    message : Message
        The received message.
    plan : pb.WindowPlan or pb.RoundPlan
        The plan in it.
    settings : RunSettings
        The run's settings.
    sender : str
        Name of the sender, for error messages.
    send_on : bool
        Whether the tensors will be forwarded; if so, their encoded form is stored with them (`Weights.link`).

    Raises
    ------
    WireError
        If the payload does not have the sections that the plan describes.
    """
    encoding = DownlinkEncoding(control.plan_sections(plan, sender), plan.architecture, settings)
    received = control.read_payload(message, encoding.wire, sender)
    found = encoding.decode(received, sender)
    narrow = send_on and found is not received
    return found.replaced({MODEL: replace(found[MODEL], link=received[MODEL])}) if narrow else found
