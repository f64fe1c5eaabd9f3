"""A window at an edge: runs its rounds with the clients and aggregates their replies as they arrive."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from espalier.config.run_settings import RunSettings
from espalier.errors import UNSOUND, ConfigError, EspalierError, WireError, unsound
from espalier.methods.aggregate import Aggregate
from espalier.methods.power_of_choice import PowD, rating
from espalier.methods.registry import create_method
from espalier.methods.run_config import RunConfig
from espalier.methods.selection import shares, top
from espalier.methods.state import ServerState
from espalier.methods.views import buffers_of
from espalier.seeds import rng_for
from espalier.wire import control
from espalier.wire.codec_registry import CodecSettings, create_codec
from espalier.wire.sections import Payload, layouts_to_proto
from espalier.wire.uplink import UplinkEncoding
from espalier_edge.calls import Caller
from espalier_edge.fleet.server import InlineGrid
from espalier_edge.pace import Pace
from espalier_edge.replies import Answered
from espalier_edge.roster import Roster
from espalier_proto import espalier_pb2 as pb

log = logging.getLogger("espalier.edge")


@dataclass
class EdgeProgress:
    """The progress of a window; the thread that answers `query.progress` reads it and notes the cloud's progress.

    Attributes
    ----------
    sent_at : float
        When the cloud sent the window plan, in seconds since the epoch.
    overtaken : threading.Event
        Set once the cloud has continued without this window.
    """

    run: str = ""
    window: int = 0
    round: int = 0
    training: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    loss: float = 0.0
    links: pb.LinkBytes = field(default_factory=pb.LinkBytes)
    flower_run: int = 0
    sent_at: float = 0.0
    overtaken: threading.Event = field(default_factory=threading.Event)

    def note_cloud_progress(self, run: str, window: int, flower_run: int, sent_at: float) -> None:
        """Note the run and window of the cloud, and abandon the window if the cloud has continued without it.

        Parameters
        ----------
        run : str
            Espalier's run id.
        window : int
            The cloud's window; 0 if the message does not state it.
        flower_run : int
            Flower's run id. A resubmitted run has a new one, and its earlier windows are obsolete.
        sent_at : float
            When the cloud sent the message, in seconds since the epoch; messages older than the window are ignored.
        """
        newer = sent_at > self.sent_at and (window > self.window or flower_run != self.flower_run)
        if self.window and run == self.run and newer:
            self.overtaken.set()

    def to_proto(self, edge: str) -> pb.Progress:
        """Return the protobuf form."""
        return pb.Progress(
            schema=control.SCHEMA,
            run=self.run,
            edge=edge,
            window=self.window,
            round=self.round,
            training=list(self.training),
            done=list(self.done),
            loss=self.loss,
            client_edge=self.links,
        )


class EdgeWindow:
    """One window of one edge.

    Between its rounds the edge acts as the server: it updates its tensors by the method's step. Its report holds the
    aggregate of the window instead of the updated model, so that the cloud takes the step over all clients; with one
    round per window this equals flat federated learning.

    Parameters
    ----------
    edge : str
        This edge's name.
    plan : pb.WindowPlan
        The cloud's plan; participants of other edges are skipped.
    payload : Payload
        The cloud's tensors.
    grid : InlineGrid
        The run's grid.
    roster : Roster
        The clients of this edge.
    progress : EdgeProgress
        Updated while the window runs.
    pace : Pace, optional
        Estimates of the clients' training times from earlier windows.
    settings : RunSettings, optional
        The validated settings of the plan; by default they are validated here.
    """

    def __init__(
        self,
        edge: str,
        plan: pb.WindowPlan,
        payload: Payload,
        grid: InlineGrid,
        roster: Roster,
        progress: EdgeProgress,
        pace: Pace | None = None,
        settings: RunSettings | None = None,
    ) -> None:
        self.edge, self.plan, self.progress = edge, plan, progress
        self.method = create_method(settings_of(plan) if settings is None else settings)
        self.server = ServerState(plan.architecture, payload, max(plan.population, 1), peers=dict(plan.peers))
        self.aggregate = Aggregate(payload.layouts)
        self.report = pb.EdgeReport(schema=control.SCHEMA, run=plan.run, window=plan.window, edge=edge)
        self.caller = Caller(edge, plan, self.method, grid, roster, self.report, self._interruption, pace)
        self._received = payload
        self._grid, self._roster = grid, roster
        self._labels: np.ndarray | None = None
        self._reached: dict[str, pb.Version] = {}
        # The state from which a client started a discarded round, by client, window and round.
        self._discarded: dict[tuple[str, int, int], pb.Version] = {}
        self._late = grid.late

    def run(self) -> tuple[pb.EdgeReport, Payload]:
        """Run the window's rounds.

        Returns
        -------
        pb.EdgeReport
            Samples, labels, participants, losses, bytes and faults.
        Payload
            The aggregate of the window, without the rounds that missed the quorum.

        Raises
        ------
        EspalierError
            The run ended, or the cloud continued without this window.
        """
        start = time.monotonic()
        for schedule in self.plan.rounds:
            mine = [p for p in schedule.participants if p.edge == self.edge]
            self._check_current()
            if mine and schedule.keep:
                mine = self._select_candidates(schedule, mine)
            if mine:
                self._round(schedule.round, mine)
        self._check_current()
        if self._labels is not None:
            self.report.labels.counts.extend(self._labels.tolist())
        return self._close(start)

    def _check_current(self) -> None:
        """Raise EspalierError if the cloud no longer waits for this window."""
        if reason := self._interruption():
            raise EspalierError(reason)

    def _interruption(self) -> str:
        """Return why the cloud no longer waits for this window, "" while it does."""
        if self._grid.closed:
            return f"the run ended during window {self.plan.window}"
        if self.progress.overtaken.is_set():
            return f"the cloud continued without window {self.plan.window}"
        return ""

    def inquire(self) -> tuple[pb.EdgeReport, Payload]:
        """Send the plan's inquiry to its participants, and return their answers; see `run` for what is raised."""
        start = time.monotonic()
        schedule = self.plan.rounds[0]
        mine = [p for p in schedule.participants if p.edge == self.edge]
        record = self.report.rounds.add(round=schedule.round)
        for answer in self._ask(self.plan.inquiry, schedule.round, mine):
            record.clients.append(_brief(answer.report))
            if answer.update.extra:
                self.aggregate.forward(answer.update.name, answer.update.extra)
        return self._close(start)

    def _round(self, round_: int, participants: list[pb.Participant]) -> None:
        """Run one round: send the tensors, aggregate the replies, and take the method's step."""
        start = time.monotonic()
        record = self.report.rounds.add(round=round_)
        self.progress.round, self.progress.done = round_, []
        self.progress.training = sorted(p.client for p in participants)
        aggregate, labels = Aggregate(self.server.payload.layouts), []
        starts = {p.client: self._start(p) for p in participants}
        for answer in self.caller.call(participants, starts, round_, self.server):
            report, update = answer.report, answer.update
            try:
                self.method.add(aggregate, update, self.server)
            except UNSOUND as error:
                self.caller.fault(update.name, "refused", unsound(error), round_)
                continue
            record.clients.append(_brief(report))
            labels.append(update.labels)
            self._count(report)
            del answer, update  # free the payload before the next one arrives
        record.seconds = time.monotonic() - start
        if len(record.clients) < max(self.plan.quorum, 1):
            detail = f"{len(record.clients)} usable replies, quorum {self.plan.quorum}"
            self.caller.fault(self.edge, "quorum", detail, round_)
            # Clients of a discarded round resume from their previous state, so they must not be reported.
            record.ClearField("clients")
            self._note_discarded(starts, round_)
            return
        counted = {c.client for c in record.clients}
        self._note_discarded({c: start for c, start in starts.items() if c not in counted}, round_)
        samples = sum(c.samples for c in record.clients)
        self.report.samples += samples
        self.report.last_round_samples = samples
        self._labels = np.sum([*labels, *([] if self._labels is None else [self._labels])], axis=0)
        for client in record.clients:
            self._reached[client.client] = pb.Version(window=self.plan.window, round=round_)
        record.loss = sum(c.loss * c.samples for c in record.clients) / samples
        log.info(
            "round %d: %d replies, loss %.4f", round_, len(counted), record.loss, extra={"round": round_}
        )
        self.progress.loss = 0.0 if math.isnan(record.loss) else record.loss  # NaN under differential privacy
        self.server.round = round_
        if round_ != self.plan.rounds[-1].round:
            self.method.step(self.server, aggregate)
            self.server.payload = self.server.payload.frozen()
        self.aggregate = self.method.gather(self.aggregate, aggregate)

    def _start(self, participant: pb.Participant) -> pb.Version:
        """Return the state version that a client starts from; the plan assumes that every earlier round counted."""
        known = (participant.start, self._reached.get(participant.client, participant.start))
        start = max(known, key=lambda v: (v.window, v.round))
        while (key := (participant.client, start.window, start.round)) in self._discarded:
            start = self._discarded[key]
        return start

    def _note_discarded(self, starts: Mapping[str, pb.Version], round_: int) -> None:
        for client, start in starts.items():
            self._discarded[client, self.plan.window, round_] = start

    def _select_candidates(
        self, schedule: pb.RoundSchedule, candidates: list[pb.Participant]
    ) -> list[pb.Participant]:
        """Select this edge's share of a round's candidates by their losses under the edge's tensors (pow-d)."""
        counts: dict[str, int] = {}
        for participant in schedule.participants:
            counts[participant.edge] = counts.get(participant.edge, 0) + 1
        keep = shares(counts, schedule.keep)[self.edge]
        answers = self._ask("loss", schedule.round, candidates)
        settings = self.method.settings.of(PowD.Settings)
        rated = {a.update.name: rating(settings, a.report.loss, a.report.samples) for a in answers}
        chosen = set(top(rated, keep))
        return [p for p in candidates if p.client in chosen]

    def _ask(self, kind: str, round_: int, participants: Sequence[pb.Participant]) -> list[Answered]:
        starts = {p.client: self._start(p) for p in participants}
        return list(self.caller.call(participants, starts, round_, self.server, inquiry=kind))

    def _close(self, start: float) -> tuple[pb.EdgeReport, Payload]:
        if late := self._grid.late - self._late:
            detail = f"{late} replies arrived after their deadline and were dropped"
            self.caller.fault("clients", "late", detail, 0)
        settings, received = self.method.settings, self._received
        name = settings.of(CodecSettings).edge_codec
        codec = None if name == "none" else create_codec(settings, name)
        # With a codec, a coordinate that no client held takes the received value: its difference is zero.
        payload, scalars = self.aggregate.report(received.views() if codec else None)
        self.report.metrics.update(scalars)
        self.report.sections.extend(layouts_to_proto(payload.layouts))
        if codec:
            buffers = buffers_of(self.plan.architecture)
            encoding = UplinkEncoding(payload.layouts, received.layouts, buffers, codec)
            rng = rng_for(settings.seed, self.edge, self.plan.window, "edge codec")
            payload = encoding.payload(payload.views(), received.views(), rng)
        self.report.seconds = time.monotonic() - start
        return self.report, payload

    def _count(self, report: pb.ClientReport) -> None:
        """Update the progress after an accepted reply."""
        self.progress.done.append(report.client)
        if report.client in self.progress.training:
            self.progress.training.remove(report.client)
        self.progress.links.CopyFrom(self.report.client_edge)


def settings_of(plan: pb.WindowPlan) -> RunConfig:
    """Return a plan's settings; raises WireError if this edge rejects them."""
    try:
        return RunConfig.from_struct(plan.settings)
    except ConfigError as error:
        raise WireError("cloud", f"settings that this edge rejects ({error})") from error


def _brief(report: pb.ClientReport) -> pb.ClientReport:
    """Return a client's report without the fields that only its edge needs."""
    brief = pb.ClientReport()
    brief.CopyFrom(report)
    for read_here in ("sections", "table", "architecture"):
        brief.ClearField(read_here)
    return brief
