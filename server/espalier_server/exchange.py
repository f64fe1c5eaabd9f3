"""An exchange with the edges: sends a plan and its tensors, checks and reads the reports."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from flwr.app import Message

from espalier.config.run_settings import RunSettings
from espalier.errors import WireError, unsound
from espalier.flower.arrays import payload_bytes
from espalier.flower.reply_outcome import fault_kind
from espalier.methods.aggregate import forwarded_in, rows_in
from espalier.methods.base import CloudState, Method
from espalier.methods.views import buffers_of
from espalier.wire import control
from espalier.wire.codec_registry import CodecSettings, create_codec
from espalier.wire.downlink import DownlinkEncoding
from espalier.wire.sections import Layouts, Payload, layouts_from_proto
from espalier.wire.traffic import CLIENT_EDGE, EDGE_CLOUD
from espalier.wire.uplink import UplinkEncoding
from espalier_proto import espalier_pb2 as pb
from espalier_server.contributions import check_contributions
from espalier_server.planning.tree import Tree
from espalier_server.window_outcome import WindowOutcome

log = logging.getLogger("espalier.cloud")

#: How often a reproducible run sends a window or an inquiry before it fails because of a missing participant.
MAX_ATTEMPTS = 3


@dataclass
class Exchange:
    """The exchange of one plan, for a window or an inquiry, with the edges that have participants in it.

    Attributes
    ----------
    method : Method
        The algorithm.
    state : CloudState
        The global state that the plan belongs to.
    tree : Tree
        Edges and clients.
    outcome : WindowOutcome
        Collects traffic, faults and signatures.
    plan : pb.WindowPlan
        The plan that is sent to the edges.
    payload : Payload
        The tensors that are sent with the plan.
    received : Payload
        The tensors as the edges decode them, which coded differences in reports refer to; set by `send`.
    """

    method: Method
    state: CloudState
    tree: Tree
    outcome: WindowOutcome
    plan: pb.WindowPlan
    payload: Payload
    received: Payload = field(default_factory=lambda: Payload({}))

    @property
    def settings(self) -> RunSettings:
        """The run's configuration."""
        return self.method.settings

    @property
    def edges(self) -> list[str]:
        """Names of the edges that have participants in the plan, sorted."""
        return sorted({p.edge for r in self.plan.rounds for p in r.participants})

    # --- down --------------------------------------------------------------------------------------

    def send(self) -> Iterator[Message]:
        """Yield the message to each edge; all have the same content, which is stored and hashed once."""
        encoding = DownlinkEncoding(self.payload.layouts, self.plan.architecture, self.settings)
        coded, self.received = encoding.encode(self.payload)
        content = control.plan_content(self.plan, coded)
        kind = control.INQUIRY if self.plan.inquiry else control.TRAIN
        size, nodes = payload_bytes(content), self.tree.edges()
        for edge in self.edges:
            if edge not in nodes:
                self._fault(edge, "lost", "disconnected before the plan was sent")
                continue
            self.outcome.ledger.add(EDGE_CLOUD, down_bytes=size, messages=1)
            yield Message(content, nodes[edge], kind, group_id=str(self.plan.window))

    # --- up ----------------------------------------------------------------------------------------

    def named(self, replies: Iterable[Message]) -> Iterator[tuple[int, str, Message]]:
        """Yield each reply with the id and the name of its edge."""
        for reply in replies:
            node = reply.metadata.src_node_id
            yield node, self.tree.name_of(node), reply

    def read(self, reply: Message, name: str) -> tuple[pb.EdgeReport, Payload]:
        """Read an edge's report and its tensors.

        Raises
        ------
        WireError
            If it is not a valid reply to this plan; or one of `UNSOUND` if the method rejects the values.
        """
        report = control.read_control(pb.EdgeReport, reply, name)
        if report.edge != name:
            raise WireError(name, f"a report in the name of {report.edge!r}")
        control.check_same_run(self.plan, report, name)
        if report.HasField("roster") and report.roster.name != name:
            raise WireError(name, f"a list of clients in the name of {report.roster.name!r}")
        checked = check_contributions(
            self.plan, report, self.tree.keys.in_force().get, required=self.settings.require_signatures
        )
        report.up_bytes = payload_bytes(reply.content)
        payload = self._tensors(reply, layouts_from_proto(report.sections, name), name)
        # Forwarded tensors may come from any planned participant: with Phoenix also from one not in the aggregate.
        planned = {p.client for r in self.plan.rounds for p in r.participants if p.edge == name}
        forwarded = forwarded_in(payload)
        if foreign := forwarded.keys() - planned:
            raise WireError(name, f"tensors of {sorted(foreign)[:3]}, which are not its participants")
        if not self.plan.inquiry:
            self.method.check_forwarded(forwarded, rows_in(payload), self.state)
        self.outcome.signatures.add(checked)
        return report, payload

    def _tensors(self, reply: Message, layouts: Layouts, name: str) -> Payload:
        """Read a report's tensors; with an `edge-codec`, those of the model are coded differences."""
        received, edge_codec = self.received, self.settings.of(CodecSettings).edge_codec
        if edge_codec == "none":
            return control.read_payload(reply, layouts, name)
        codec, buffers = create_codec(self.settings, edge_codec), buffers_of(self.plan.architecture)
        encoding = UplinkEncoding(layouts, received.layouts, buffers, codec)
        payload = control.read_payload(reply, encoding.wire, name)
        return encoding.whole(payload, received.views(), name)

    # --- outcome -----------------------------------------------------------------------------------

    def count(self, report: pb.EdgeReport) -> None:
        """Add a report's traffic and faults to the outcome."""
        self.outcome.faults.extend(report.faults)
        down = report.client_edge
        self.outcome.ledger.add(
            CLIENT_EDGE, up_bytes=down.up_bytes, down_bytes=down.down_bytes, messages=down.messages
        )
        self.outcome.ledger.add(EDGE_CLOUD, up_bytes=report.up_bytes, messages=1)

    def refuse(self, reply: Message, name: str, error: Exception) -> None:
        """Record a rejected reply as a fault with its reason."""
        self._fault(name, fault_kind(reply), error.fault if isinstance(error, WireError) else unsound(error))

    def record_stragglers(self) -> None:
        """Record the edges that neither reported nor failed as stragglers."""
        for edge in self.edges:
            if edge not in self.outcome.reports and edge not in {f.node for f in self.outcome.faults}:
                self._fault(edge, "straggler", "no report of the window before its deadline")

    def _fault(self, node: str, kind: str, detail: str) -> None:
        window = self.state.window + 1
        log.warning("window %d: %s %s: %s", window, node, kind, detail)
        self.outcome.faults.append(pb.Fault(tier="cloud", node=node, kind=kind, detail=detail, window=window))
