"""The edge's app: answers each message of the cloud, whether a window plan, a hello or a plain Flower message."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flwr.app import ConfigRecord, Context, Message, RecordDict

from espalier.config.timeouts import CLIENT_HELLO, CLIENT_REFUSAL, REPLY_MARGIN
from espalier.errors import EspalierError, WireError
from espalier.flower.arrays import payload_bytes
from espalier.flower.memory import trim_heap
from espalier.flower.resident import Fab
from espalier.monitor.logs import bind
from espalier.security.name_registry import CLIENT_NAMES, Claims, NameRegistry
from espalier.wire import control
from espalier.wire.downlink import read_downlink
from espalier.wire.hello import device_facts
from espalier.wire.sections import Payload
from espalier_edge.edge_status import EdgeTotals
from espalier_edge.fleet.server import InlineFleet, InlineGrid
from espalier_edge.pace import Pace
from espalier_edge.relay import relay, run_record
from espalier_edge.roster import Roster
from espalier_edge.rounds import EdgeProgress, EdgeWindow, settings_of
from espalier_proto import espalier_pb2 as pb

log = logging.getLogger("espalier.edge")

#: Message types that are answered while a window runs.
SIDE_TYPES = frozenset({control.HELLO, control.REFUSAL, control.PROGRESS, control.DONE})


class Cloud(Protocol):
    """Requests of the edge to its cloud; run ids are Flower's."""

    def fetch_fab(self, run_id: int) -> Fab | None:
        """Return the Flower App Bundle of a run, None if it has none."""

    def run_is_over(self, run_id: int) -> bool:
        """Return whether a run has ended at the cloud."""


@dataclass
class ServedRun:
    """The cloud run that this edge serves.

    Attributes
    ----------
    key : str
        Espalier's run id.
    flower_run : int
        Flower's run id at the cloud.
    grid : InlineGrid
        The grid of the edge's own clients.
    """

    key: str
    flower_run: int
    grid: InlineGrid


class EdgeApp:
    """The edge's side of the uplink: called with every message of the cloud.

    Parameters
    ----------
    name : str
        This edge's name.
    fleet : InlineFleet
        Its Fleet server.
    state : Path
        The edge's state folder.
    cloud : Cloud
        Requests to the cloud about its runs.
    names : Claims, optional
        Which key may use which client name; by default a name belongs to the first key that claims it.
    """

    def __init__(
        self, name: str, fleet: InlineFleet, state: Path, cloud: Cloud, names: Claims | None = None
    ) -> None:
        self.name = name
        self.fleet = fleet
        self.roster = Roster(fleet, names or NameRegistry(state / CLIENT_NAMES))
        self.progress = EdgeProgress()
        self.totals = EdgeTotals()
        self._pace = Pace()
        self._cloud = cloud
        self._served: ServedRun | None = None
        self._lock = threading.RLock()
        self._request = ConfigRecord()
        self._window = threading.Lock()

    def __call__(self, message: Message, context: Context) -> Message:
        """Return the reply to one message; the node turns an exception into an Error reply."""
        kind = message.metadata.message_type
        if kind == control.PROGRESS:
            self._note_cloud_progress(message)
            content = control.control_content(self.progress.to_proto(self.name))
        elif kind == control.HELLO:
            self._note_cloud_progress(message)
            content = self._hello(message, context)
        elif kind == control.REFUSAL:
            self._forward_refusals(message)
            content = RecordDict()
        elif kind == control.DONE:
            self.close()
            content = RecordDict()
        else:
            with self._window:
                plan = control.plan_bytes(message)
                self.totals.count_window_plan(payload_bytes(message.content))
                content = (
                    self._relay(message, context)
                    if plan is None
                    else self._run_window(plan, message, context)
                )
        return Message(content, reply_to=message)

    def close(self) -> None:
        """Stop serving the current run: its messages and objects are deleted."""
        with self._lock:
            if self._served is not None:
                self._served.grid.close()
                self._served = None
                self.roster.reset()
                self.progress, self._pace = EdgeProgress(), Pace()

    # --- a window ----------------------------------------------------------------------------------

    def _run_window(self, data: bytes, message: Message, context: Context) -> RecordDict:
        plan = control.decode(pb.WindowPlan, data, "cloud")
        settings = settings_of(plan)
        payload = read_downlink(message, plan, settings, "cloud", send_on=True)
        grid = self._serve(plan.run, message, context)
        metadata = message.metadata
        self.progress = EdgeProgress(
            run=plan.run,
            window=plan.window,
            flower_run=metadata.run_id,
            sent_at=metadata.created_at,
        )
        log.info("run %s window %d: %d rounds", plan.run, plan.window, len(plan.rounds))
        self.roster.refresh(grid, self._request, CLIENT_HELLO)
        trim_heap()  # free the memory of start-up and hellos before the round, whose payloads determine the peak
        window = EdgeWindow(self.name, plan, payload, grid, self.roster, self.progress, self._pace, settings)
        with bind(run=plan.run, window=plan.window):
            if plan.inquiry:
                return self._window_content(*window.inquire())
            report, aggregate = window.run()
        del window  # its aggregate is in the payload
        trim_heap()
        self.roster.refresh(grid, self._request, CLIENT_HELLO)
        report.roster.CopyFrom(self._edge_hello())
        return self._window_content(report, aggregate)

    def _note_cloud_progress(self, message: Message) -> None:
        """Read the run and window of the cloud from a message that states them."""
        request, metadata = control.config_of(message, control.CONFIG) or ConfigRecord(), message.metadata
        window = request.get("window", 0)
        self.progress.note_cloud_progress(
            str(request.get("run", "")),
            window if isinstance(window, int) else 0,
            metadata.run_id,
            metadata.created_at,
        )

    def _window_content(self, report: pb.EdgeReport, payload: Payload) -> RecordDict:
        loss = report.rounds[-1].loss if report.rounds else 0.0
        content = control.report_content(report, payload, report.samples, loss)
        self.totals.add(report, payload_bytes(content))
        return content

    # --- hello -------------------------------------------------------------------------------------

    def _hello(self, message: Message, context: Context) -> RecordDict:
        request = control.config_of(message, control.CONFIG) or ConfigRecord()
        run = str(request.get("run", ""))
        busy = self._busy_with(run)
        # Clients do not answer a hello while a window runs; the roster then stays as it is.
        if not busy and self._window.acquire(blocking=False):
            try:
                grid = self._serve(run, message, context)
                if request != self._request:
                    self.roster.reset()
                    self._request = request
                self.roster.refresh(grid, request, CLIENT_HELLO)
            finally:
                self._window.release()
        hello = self._edge_hello()
        hello.busy_with = busy
        return control.control_content(hello)

    def _edge_hello(self) -> pb.EdgeHello:
        faults, self.roster.faults = self.roster.faults, []
        self.totals.count(faults)
        return pb.EdgeHello(
            schema=control.SCHEMA,
            name=self.name,
            clients=[k.hello for k in self.roster.clients().values()],
            faults=faults,
            facts=device_facts("cpu"),
        )

    def _forward_refusals(self, message: Message) -> None:
        """Send clients of this edge the reason why the cloud excludes them from its run."""
        request = control.config_of(message, control.CONFIG) or ConfigRecord()
        names, faults = request.get("clients"), request.get("faults")
        if not isinstance(names, list) or not isinstance(faults, list) or len(names) != len(faults):
            raise WireError("cloud", "a refusal without a fault for every client")
        with self._lock:
            served = self._served
        if served is None or served.key != request.get("run"):
            return
        clients = self.roster.clients()
        messages = []
        for name, fault in zip(names, faults, strict=True):
            if isinstance(name, str) and name in clients:
                log.warning("the cloud excludes %s: %s", name, fault)
                record = ConfigRecord({"run": served.key, "fault": str(fault)})
                content = RecordDict({control.CONFIG: record})
                messages.append(Message(content, clients[name].node_id, control.REFUSAL))
        for reply in served.grid.exchange(messages, deadline=CLIENT_REFUSAL):
            if reply.has_error():
                log.warning("a client did not accept the notice of its exclusion: %s", reply.error.reason)

    # --- any Flower app ----------------------------------------------------------------------------

    def _relay(self, message: Message, context: Context) -> RecordDict:
        # The run of a stock ServerApp has no Espalier run id; Flower's is unique at its cloud.
        run = f"flwr-{message.metadata.run_id}"
        grid = self._serve(run, message, context)
        left = message.metadata.created_at + message.metadata.ttl - time.time() - REPLY_MARGIN
        content, faults = relay(message, grid, run_record(run, context.run_config), max(left, 1.0))
        for fault in faults:
            log.warning("%s", fault)
        return content

    # --- one run at a time -------------------------------------------------------------------------

    def _busy_with(self, run: str) -> str:
        """Return the id of another run that this edge serves and that has not ended; "" if there is none."""
        with self._lock:
            served = self._served
            if served is None or served.key == run:
                return ""
        # Ask the cloud whether the run still exists, as a ServerApp that was killed does not announce its end.
        return "" if self._cloud.run_is_over(served.flower_run) else served.key

    def _serve(self, run: str, message: Message, context: Context) -> InlineGrid:
        """Return the grid of a cloud run; if the run is new, close the previous grid and open one."""
        if not run:
            raise WireError("cloud", "a message without a run id")
        with self._lock:
            if busy := self._busy_with(run):
                raise EspalierError(
                    f"edge {self.name} serves run {busy}; stop it or wait until it has finished"
                )
            if self._served is None or self._served.key != run:
                self.close()
                fab = self._cloud.fetch_fab(message.metadata.run_id)
                grid = self.fleet.open_run(fab=fab, run_config=dict(context.run_config))
                self._served = ServedRun(run, message.metadata.run_id, grid)
            # A resumed run has a new Flower run id.
            self._served.flower_run = message.metadata.run_id
            return self._served.grid
