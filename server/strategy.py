"""Windows as a Flower strategy: plans and the model go to the edges, their reports become the next model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from common.errors import WireError
from common.flower.arrays import payload_bytes
from common.homogeneity import sh_score
from common.methods.aggregation import Update
from common.methods.base import CloudState, Method, architecture_layout
from common.methods.planning import Round, plan_window
from common.run.ledger import CLIENT_EDGE, EDGE_CLOUD, Ledger
from common.wire import control
from proto import espalier_pb2 as pb
from server.tree import Tree

log = logging.getLogger("espalier.cloud")

Version = tuple[int, int]


@dataclass
class WindowOutcome:
    """What the reports of a window said.

    Attributes
    ----------
    reports : dict[str, pb.EdgeReport]
        By edge name; only reports that were accepted.
    rho : dict[str, float]
        Each edge's share in the central aggregation.
    mu : dict[str, float]
        SH score of the labels each edge trained on.
    ledger : Ledger
        Payload bytes of this window.
    faults : list[pb.Fault]
        The edges' faults and the cloud's.
    """

    reports: dict[str, pb.EdgeReport] = field(default_factory=dict)
    rho: dict[str, float] = field(default_factory=dict)
    mu: dict[str, float] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    faults: list[pb.Fault] = field(default_factory=list)


class WindowStrategy(Strategy):
    """One of Flower's rounds is one window of the tree.

    Parameters
    ----------
    method : Method
        The algorithm.
    state : CloudState
        The global state; `aggregate_train` moves it on.
    tree : Tree
        Edges and clients.
    run : str
        Espalier's run id.
    reached : Mapping[str, Version], optional
        Newest state version of each client that the cloud knows of, from a checkpoint.
    """

    def __init__(
        self,
        method: Method,
        state: CloudState,
        tree: Tree,
        run: str,
        reached: Mapping[str, Version] | None = None,
    ) -> None:
        self.method, self.state, self.tree, self.run = method, state, tree, run
        self.settings = method.settings
        self.reached: dict[str, Version] = dict(reached or {})
        self.checkpoint_window = state.window
        self.plan: list[Round] = []
        self.first_round = 0
        self.outcome = WindowOutcome()
        self._sent: pb.WindowPlan = pb.WindowPlan()

    def summary(self) -> None:
        """Log what will be run."""
        s = self.settings
        log.info("%s: %d rounds in %d windows of %d", self.method.name, s.rounds, s.windows, s.rg)

    # --- down --------------------------------------------------------------------------------------

    def draw(self) -> list[Round]:
        """Plan the next window: who trains in each of its rounds, and at which edge."""
        s = self.settings
        self.first_round = self.state.round + 1
        self.plan = plan_window(
            self.tree.members(),
            self.method.edge_choice(),
            first_round=self.first_round,
            rounds=min(s.rg, s.rounds - self.state.round),
            fraction=s.fraction,
            seed=s.seed,
        )
        return self.plan

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Yield the plan and the global model to every edge that has a part in it.

        All edges get one and the same content, so it is stored and hashed once.
        """
        self.outcome = WindowOutcome()
        self._sent = self._window_plan()
        content = control.plan_content(self._sent, arrays)
        size = payload_bytes(content)
        edges = self.tree.edges()
        for edge in sorted({e for assignment in self.plan for e in assignment.values()}):
            self.outcome.ledger.add(EDGE_CLOUD, down_bytes=size, messages=1)
            yield Message(content, edges[edge], control.TRAIN, group_id=str(server_round))

    def _window_plan(self) -> pb.WindowPlan:
        s = self.settings
        window = self.state.window + 1
        start = dict(self.reached)
        schedules = []
        for offset, assignment in enumerate(self.plan):
            round_ = self.first_round + offset
            schedule = pb.RoundSchedule(round=round_)
            for client, edge in assignment.items():
                at = start.get(client, (0, 0))
                schedule.participants.add(
                    client=client, edge=edge, start=pb.Version(window=at[0], round=at[1])
                )
                start[client] = (window, round_)
            schedules.append(schedule)
        return pb.WindowPlan(
            schema=control.SCHEMA,
            run=self.run,
            window=window,
            rounds=schedules,
            settings=s.to_struct(),
            architecture=self.state.architecture,
            checkpoint_window=self.checkpoint_window,
            round_deadline=s.round_deadline,
            quorum=s.quorum,
        )

    # --- up ----------------------------------------------------------------------------------------

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add the edges' models up as they arrive, and move the global state on by a window.

        A reply that is not sound is refused by name, and the window goes on without it. If no edge
        has a sample the model stays as it was.
        """
        aggregation = self.method.cloud_aggregation()
        layout = architecture_layout(self.state.architecture)
        names = {node: name for name, node in self.tree.edges().items()}
        samples = 0
        for reply in replies:
            node = reply.metadata.src_node_id
            name = names.get(node, f"node {node}")
            try:
                report, update = self._read(reply, name)
                if fault := layout.difference(update.weights.layout):
                    raise WireError(name, fault)
                if report.samples:
                    aggregation.accept(update)
            except (WireError, ValueError) as error:
                kind = "error" if reply.has_error() else "refused"
                self._fault(name, kind, error.fault if isinstance(error, WireError) else str(error))
                continue
            self._account(node, name, report)
            if report.samples:
                samples += report.samples
                self.outcome.mu[name] = sh_score(update.labels, self.settings.homogeneity_form)
        planned = {e for assignment in self.plan for e in assignment.values()}
        for silent in sorted(planned - set(self.outcome.reports) - {f.node for f in self.outcome.faults}):
            self._fault(silent, "straggler", "no report of the window before its deadline")
        self.outcome.rho = aggregation.shares()
        mean = aggregation.result()
        if mean is not None:
            self.state.weights = mean
        self.state.window += 1
        self.state.round += len(self.plan)
        return (None if mean is None else mean.to_record()), MetricRecord(
            {"edges": len(self.outcome.reports), control.NUM_EXAMPLES: samples}
        )

    def _read(self, reply: Message, name: str) -> tuple[pb.EdgeReport, Update]:
        report = control.read_control(pb.EdgeReport, reply, name)
        if report.edge != name:
            raise WireError(name, f"a report in the name of {report.edge!r}")
        control.check_same_run(self._sent, report, name)
        if report.HasField("roster") and report.roster.name != name:
            raise WireError(name, f"a list of clients in the name of {report.roster.name!r}")
        given = {client for assignment in self.plan for client, edge in assignment.items() if edge == name}
        if foreign := {c.client for r in report.rounds for c in r.clients} - given:
            raise WireError(name, f"updates of {sorted(foreign)[:3]}, which it was not given")
        layout = control.reply_layout(report, control.plan_layout(self._sent, name), name)
        weights = control.read_weights(reply, layout, name)
        classes = len(self.tree.classes)
        counts = report.labels.counts
        if len(counts) not in (0, classes) or not all(np.isfinite(c) and c >= 0 for c in counts):
            raise WireError(
                name, f"a label distribution of {len(counts)} counts for {classes} classes, or a bad count"
            )
        if report.samples and not counts:
            raise WireError(name, "samples without a label distribution")
        labels = np.asarray(counts, dtype=np.float64) if counts else np.zeros(classes)
        update = Update(
            name, weights, report.samples, labels, report.last_round_samples, dict(report.metrics)
        )
        return report, update

    def _account(self, node: int, name: str, report: pb.EdgeReport) -> None:
        self.outcome.reports[name] = report
        self.outcome.faults.extend(report.faults)
        down = report.client_edge
        self.outcome.ledger.add(
            CLIENT_EDGE, up_bytes=down.up_bytes, down_bytes=down.down_bytes, messages=down.messages
        )
        self.outcome.ledger.add(EDGE_CLOUD, up_bytes=report.up_bytes, messages=1)
        for record in report.rounds:
            for client in record.clients:
                version = (report.window, record.round)
                self.reached[client.client] = max(version, self.reached.get(client.client, (0, 0)))
        if report.HasField("roster"):
            self.tree.learn(node, report.roster)

    def _fault(self, node: str, kind: str, detail: str) -> None:
        log.warning("window %d: %s %s: %s", self.state.window + 1, node, kind, detail)
        self.outcome.faults.append(
            pb.Fault(tier="cloud", node=node, kind=kind, detail=detail, window=self.state.window + 1)
        )

    # --- evaluation at the clients is not used: the cloud measures samples -------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        """Ask nobody."""
        return iter(())

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing."""
        return None
