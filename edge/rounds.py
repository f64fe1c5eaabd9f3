"""A window at an edge: its rounds with its clients, added up as the replies arrive (DESIGN §2)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from common.errors import ConfigError, EspalierError, WireError
from common.flower.arrays import payload_bytes
from common.flower.inline import InlineGrid
from common.methods.aggregation import Update
from common.methods.registry import create_method
from common.run.config import RunConfig
from common.wire import control
from common.wire.payload import Layout, Weights
from edge.roster import Known, Roster
from proto import espalier_pb2 as pb

log = logging.getLogger("espalier.edge")


@dataclass
class EdgeProgress:
    """How far a window is; read by another thread that answers `query.progress`."""

    run: str = ""
    window: int = 0
    round: int = 0
    training: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    loss: float = 0.0
    links: pb.LinkBytes = field(default_factory=pb.LinkBytes)

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

    Parameters
    ----------
    edge : str
        This edge's name.
    plan : pb.WindowPlan
        The cloud's plan; the parts of other edges are passed over.
    weights : Weights
        The global model to start from.
    grid : InlineGrid
        The run's grid.
    roster : Roster
        The clients below this edge.
    progress : EdgeProgress
        Kept up to date for onlookers.
    """

    def __init__(
        self,
        edge: str,
        plan: pb.WindowPlan,
        weights: Weights,
        grid: InlineGrid,
        roster: Roster,
        progress: EdgeProgress,
    ) -> None:
        self.edge, self.plan, self.weights = edge, plan, weights
        self.grid, self.roster, self.progress = grid, roster, progress
        try:
            self.settings = RunConfig.from_struct(plan.settings)
            self.method = create_method(self.settings)
        except ConfigError as error:
            raise WireError("cloud", f"settings this edge does not take ({error})") from error
        self.layout = weights.layout
        self.report = pb.EdgeReport(schema=control.SCHEMA, run=plan.run, window=plan.window, edge=edge)
        self._labels: np.ndarray | None = None
        self._reached: dict[str, pb.Version] = {}
        self._late = grid.late

    def run(self) -> pb.EdgeReport:
        """Run the window's rounds; afterwards `weights` is this edge's model.

        Returns
        -------
        pb.EdgeReport
            Samples, labels, who took part, losses, bytes and faults. A round in which nobody
            replied leaves the model as it was.
        """
        start = time.monotonic()
        for schedule in self.plan.rounds:
            mine = [p for p in schedule.participants if p.edge == self.edge]
            if self.grid.closed:
                raise EspalierError("the run was ended in the middle of the window")
            if mine:
                self._round(schedule.round, mine)
        if self._labels is not None:
            self.report.labels.counts.extend(self._labels.tolist())
        if late := self.grid.late - self._late:
            self._fault("clients", "late", f"{late} replies came after their deadline and were dropped", 0)
        self.report.seconds = time.monotonic() - start
        return self.report

    def _round(self, round_: int, participants: list[pb.Participant]) -> None:
        """Send the model, add up the replies, adopt the mean."""
        start = time.monotonic()
        record = self.report.rounds.add(round=round_)
        clients = self.roster.clients()
        called = {p.client: clients[p.client] for p in participants if p.client in clients}
        for missing in [p.client for p in participants if p.client not in clients]:
            self._fault(missing, "lost", "not connected when its round began", round_)
        self.progress.round, self.progress.training = round_, sorted(called)
        self.progress.done = []

        aggregation = self.method.edge_aggregation()
        plans = {p.client: self._round_plan(round_, p) for p in participants if p.client in called}
        samples = 0
        for reply in self.grid.exchange(
            self._messages(plans, called), deadline=self.plan.round_deadline, quorum=None
        ):
            name = self.roster.name_of(reply.metadata.src_node_id)
            try:
                report, update = self._read(reply, plans, called, name)
                aggregation.accept(update)
            except WireError as error:
                self._fault(name, "error" if reply.has_error() else "refused", error.fault, round_)
                continue
            except ValueError as error:
                self._fault(name, "refused", str(error), round_)
                continue
            self._count(record, report, update, called[name])
            samples += report.samples
        for name in set(called) - {c.client for c in record.clients} - self._faulty(round_):
            self._fault(name, "straggler", f"no reply within {self.plan.round_deadline:g} s", round_)

        mean = aggregation.result()
        if mean is None or len(record.clients) < self.plan.quorum:
            self._fault(
                self.edge,
                "quorum",
                f"{len(record.clients)} usable replies, quorum {self.plan.quorum}",
                round_,
            )
        else:
            self.weights = mean
            self.report.samples += samples
            self.report.last_round_samples = samples
            for client in record.clients:
                self._reached[client.client] = pb.Version(window=self.plan.window, round=round_)
                labels = called[client.client].labels
                self._labels = labels.copy() if self._labels is None else self._labels + labels
            record.loss = sum(c.loss * c.samples for c in record.clients) / samples
            self.progress.loss = record.loss
        record.seconds = time.monotonic() - start

    def _round_plan(self, round_: int, participant: pb.Participant) -> pb.RoundPlan:
        """Tell one client what to do, and from which state of its own."""
        plan = pb.RoundPlan(
            schema=control.SCHEMA,
            run=self.plan.run,
            window=self.plan.window,
            round=round_,
            client=participant.client,
            edge=self.edge,
            start=self._reached.get(participant.client, participant.start),
            checkpoint_window=self.plan.checkpoint_window,
            settings=self.plan.settings,
            architecture=self.plan.architecture,
        )
        if self.plan.HasField("layout"):
            plan.layout.CopyFrom(self.plan.layout)
        return plan

    def _messages(self, plans: dict[str, pb.RoundPlan], called: dict[str, Known]) -> Iterator[Message]:
        """Yield one message a client; all share one payload record, which is stored and hashed once."""
        arrays: ArrayRecord = self.weights.to_record()
        for name, plan in plans.items():
            content = RecordDict(
                {
                    control.ARRAYS: arrays,
                    control.CONFIG: ConfigRecord({control.PLAN: plan.SerializeToString()}),
                }
            )
            self.report.client_edge.down_bytes += payload_bytes(content)
            self.report.client_edge.messages += 1
            yield Message(content, called[name].node_id, control.TRAIN, group_id=str(plan.round))

    def _read(
        self, reply: Message, plans: dict[str, pb.RoundPlan], called: dict[str, Known], name: str
    ) -> tuple[pb.ClientReport, Update]:
        """Validate a reply."""
        report = control.read_control(pb.ClientReport, reply, name)
        if name not in plans or report.client != name:
            raise WireError(name, f"an update in the name of {report.client!r}")
        control.check_same_run(plans[name], report, name)
        if not 0 < report.samples <= called[name].hello.samples:
            raise WireError(name, f"{report.samples} samples, its hello had {called[name].hello.samples}")
        if not np.isfinite(report.loss):
            raise WireError(name, "a loss that is not a number")
        layout: Layout = control.reply_layout(report, self.layout, name)
        if fault := self.layout.difference(layout):
            raise WireError(name, fault)
        weights = control.read_weights(reply, layout, name)
        return report, Update(
            name, weights, report.samples, called[name].labels, report.samples, dict(report.metrics)
        )

    def _count(self, record: pb.RoundRecord, report: pb.ClientReport, update: Update, known: Known) -> None:
        """Enter an accepted reply into the report."""
        brief = pb.ClientReport()
        brief.CopyFrom(report)
        brief.ClearField("layout")
        record.clients.append(brief)
        self.report.client_edge.up_bytes += report.up_bytes
        self.report.client_edge.messages += 1
        self.progress.done.append(update.name)
        if update.name in self.progress.training:
            self.progress.training.remove(update.name)
        self.progress.links.CopyFrom(self.report.client_edge)

    def _faulty(self, round_: int) -> set[str]:
        return {f.node for f in self.report.faults if f.round == round_}

    def _fault(self, node: str, kind: str, detail: str, round_: int) -> None:
        log.warning("window %d round %d: %s %s: %s", self.plan.window, round_, node, kind, detail)
        self.report.faults.append(
            pb.Fault(tier="edge", node=node, kind=kind, detail=detail, window=self.plan.window, round=round_)
        )
