"""Calls clients: sends each its round plan, and yields the valid replies as they arrive."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from flwr.app import Message

from espalier.config.reproducible import in_order
from espalier.errors import EspalierError, WireError
from espalier.flower.arrays import payload_bytes
from espalier.flower.reply_outcome import fault_kind
from espalier.methods.base import Method
from espalier.methods.state import ServerState, architecture_layout
from espalier.methods.views import ClientView, whole_view
from espalier.wire import control
from espalier.wire.codec_registry import CodecSettings
from espalier.wire.downlink import DownlinkEncoding
from espalier.wire.payload import Layout
from espalier.wire.sections import MODEL, PEER, layouts_to_proto
from espalier_edge.fleet.server import InlineGrid
from espalier_edge.pace import Pace, work_of
from espalier_edge.replies import Answered, ReplyReader
from espalier_edge.roster import Member, Roster
from espalier_proto import espalier_pb2 as pb

log = logging.getLogger("espalier.edge")

#: Number of clients that an error message names.
NAMES_SHOWN = 5


class Caller:
    """Sends the round plans of a window to clients and reads their replies.

    Parameters
    ----------
    edge : str
        This edge's name.
    plan : pb.WindowPlan
        The window's plan.
    method : Method
        The run's method.
    grid : InlineGrid
        The run's grid.
    roster : Roster
        The clients of this edge.
    report : pb.EdgeReport
        Faults and bytes are added to it.
    interruption : callable
        Returns why the window was ended early, "" while the cloud waits for it.
    pace : Pace, optional
        Estimates of the clients' training times.
    """

    def __init__(
        self,
        edge: str,
        plan: pb.WindowPlan,
        method: Method,
        grid: InlineGrid,
        roster: Roster,
        report: pb.EdgeReport,
        interruption: Callable[[], str] = lambda: "",
        pace: Pace | None = None,
    ) -> None:
        self.edge, self.plan, self.method = edge, plan, method
        self._interruption, self._pace = interruption, pace or Pace()
        self.grid, self.roster, self.report = grid, roster, report
        self._server_peers: dict[str, pb.ArchitectureSpec] = {}
        self._replies = ReplyReader(method)

    def call(
        self,
        participants: Sequence[pb.Participant],
        starts: Mapping[str, pb.Version],
        round_: int,
        server: ServerState,
        inquiry: str = "",
    ) -> Iterator[Answered]:
        """Send every participant its view of the server's tensors, and yield the valid replies as they arrive.

        In a reproducible run they are yielded in the order of the clients' names, see `in_order`. Invalid, missing and
        late replies are added to the report as faults of their senders.

        Parameters
        ----------
        participants : sequence of pb.Participant
            The clients to call.
        starts : mapping of str to pb.Version
            The state version that each one starts from.
        round_ : int
            The round.
        server : ServerState
            The server's tensors.
        inquiry : str
            The kind of inquiry; "": training.

        Raises
        ------
        EspalierError
            The window was ended before every client had replied. The others are not stragglers, as the deadline had
            not passed.
        """
        clients = self.roster.clients()
        called = {p.client: clients[p.client] for p in participants if p.client in clients}
        for absent in (p.client for p in participants if p.client not in clients):
            self.fault(absent, "lost", "not connected at the start of its round", round_)
        views = self._views(server, participants)
        self._server_peers = server.peers
        sent = {p.client: views[p.view] for p in participants}
        plans = {
            p.client: self._round_plan(round_, p.client, starts[p.client], sent[p.client], inquiry)
            for p in participants
            if p.client in called
        }
        found = self._answers(plans, sent, called, round_, inquiry)
        if self.method.settings.reproducible:
            yield from in_order(found, called)
            return
        for _, answer in found:
            if answer is not None:
                yield answer
            del answer

    def _answers(
        self,
        plans: Mapping[str, pb.RoundPlan],
        sent: Mapping[str, ClientView],
        called: Mapping[str, Member],
        round_: int,
        inquiry: str,
    ) -> Iterator[tuple[str, Answered | None]]:
        """Yield each client's valid reply as it arrives, None for an invalid one; record the faults."""
        done: set[str] = set()
        works = self._works(called, sent)
        deadline = self._deadline(works, called, inquiry)
        messages = self._messages(plans, sent, called)
        start = time.monotonic()
        for reply in self.grid.exchange(messages, deadline=deadline, cancelled=self._interrupted):
            name = self.roster.name_of(reply.metadata.src_node_id)
            done.add(name)
            if not inquiry and name in works and reply.has_content():
                self._pace.record(name, works[name], time.monotonic() - start)
            try:
                answer = self._replies.read(reply, name, plans, sent, called)
            except WireError as error:
                self.fault(name, fault_kind(reply), error.fault, round_)
                yield name, None
                continue
            self.report.client_edge.up_bytes += answer.report.up_bytes
            self.report.client_edge.messages += 1
            self.report.signatures += answer.report.HasField("signed")
            yield name, answer
            del reply, answer
        missing = sorted(set(called) - done)
        if missing and (reason := self._interruption()):
            first = ", ".join(missing[:NAMES_SHOWN]) + (", …" if len(missing) > NAMES_SHOWN else "")
            raise EspalierError(
                f"{reason}; round {round_} is abandoned without {len(missing)} of {len(called)} replies ({first})"
            )
        for name in missing:
            if not inquiry:
                self._pace.record_miss(name, works[name], deadline)
            self.fault(name, "straggler", f"no reply within {deadline:.3g} s", round_)

    def _interrupted(self) -> bool:
        return bool(self._interruption())

    def _works(self, called: Mapping[str, Member], sent: Mapping[str, ClientView]) -> dict[str, float]:
        """Return the work of each client, see `work_of`."""
        settings = self.method.settings
        return {
            name: work_of(settings, known.hello.samples, sent[name].payload.nbytes)
            for name, known in called.items()
        }

    def _deadline(self, works: Mapping[str, float], called: Mapping[str, Member], inquiry: str) -> float:
        """Return the seconds to wait, estimated from the clients' pace and at most the plan's deadline.

        A reproducible run always waits until the plan's deadline, as a straggler would invalidate its window.
        """
        limit, settings = self.plan.round_deadline, self.method.settings
        if inquiry or settings.reproducible or not settings.adaptive_deadline:
            return limit
        return self._pace.deadline(works, {n: k.hello.facts.speed for n, k in called.items()}, limit)

    def fault(self, node: str, kind: str, detail: str, round_: int) -> None:
        """Log a fault and add it to the report."""
        fields = {"round": round_, "client": node, "fault": kind}
        log.warning(
            "window %d round %d: %s %s: %s", self.plan.window, round_, node, kind, detail, extra=fields
        )
        self.report.faults.append(
            pb.Fault(tier="edge", node=node, kind=kind, detail=detail, window=self.plan.window, round=round_)
        )

    def _views(self, server: ServerState, participants: Sequence[pb.Participant]) -> dict[str, ClientView]:
        """Return the views of all participants by key; each is built once."""
        found = {}
        for key in {p.view for p in participants}:
            if key:
                if key not in self.plan.views:
                    raise WireError("cloud", f"a plan that does not describe its view {key!r}")
                found[key] = self.method.cut(key, self.plan.views[key], server)
            else:
                found[key] = whole_view(server, self.method.server_sections)
        return {key: self._encoded(view) for key, view in found.items()}

    def _encoded(self, view: ClientView) -> ClientView:
        """Return a view with its tensors as clients decode them, and their encoded form."""
        settings = self.method.settings
        if settings.of(CodecSettings).downlink == "none":
            return replace(view, payload=view.payload.frozen())
        encoding = DownlinkEncoding(view.payload.layouts, view.architecture, settings)
        coded, read = encoding.encode(view.payload)
        return replace(view, payload=read, coded=coded.frozen())

    def _round_plan(
        self, round_: int, client: str, start: pb.Version, sent: ClientView, inquiry: str
    ) -> pb.RoundPlan:
        """Return the round plan of one client."""
        return pb.RoundPlan(
            schema=control.SCHEMA,
            run=self.plan.run,
            window=self.plan.window,
            round=round_,
            client=client,
            edge=self.edge,
            start=start,
            checkpoint_window=self.plan.checkpoint_window,
            settings=self.plan.settings,
            architecture=sent.architecture,
            sections=self._sections(sent),
            population=self.plan.population,
            returns=sent.returns,
            inquiry=inquiry,
            peers=self._peers(sent),
            nonce=self.plan.nonce,
        )

    @staticmethod
    def _sections(sent: ClientView) -> list[pb.Section]:
        """Return the plan's description of the payload; empty if that is the architecture's tensors in order."""
        layouts = sent.payload.layouts
        if layouts == {MODEL: architecture_layout(sent.architecture)}:
            return []
        return layouts_to_proto(layouts or {MODEL: Layout(())})

    def _peers(self, sent: ClientView) -> dict[str, pb.ArchitectureSpec]:
        """Return the architectures of the clients' own networks of which a copy is sent."""
        owners = {section.member for section in sent.payload if section.name == PEER}
        return {client: spec for client, spec in self._server_peers.items() if client in owners}

    def _messages(
        self, plans: Mapping[str, pb.RoundPlan], sent: Mapping[str, ClientView], called: Mapping[str, Member]
    ) -> Iterator[Message]:
        """Yield one message per client; those of one view share a payload, which is stored and hashed once."""
        for name, plan in plans.items():
            part = sent[name]
            content = control.plan_content(plan, part.coded or part.payload)
            self.report.client_edge.down_bytes += payload_bytes(content)
            self.report.client_edge.messages += 1
            kind = control.INQUIRY if plan.inquiry else control.TRAIN
            yield Message(content, called[name].node_id, kind, group_id=str(plan.round))
