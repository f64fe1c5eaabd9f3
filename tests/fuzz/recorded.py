"""Real exchanges of a small tree, played again to an edge or a cloud with one reply changed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
from bench.local_tree import LocalClient, LocalTree
from flwr.app import ConfigRecord, Message, RecordDict
from google.protobuf.struct_pb2 import Value

from espalier.methods.base import CloudState
from espalier.wire import control
from espalier.wire.sections import Payload, Sections
from espalier_edge.roster import Member, Roster
from espalier_edge.rounds import EdgeProgress, EdgeWindow
from espalier_proto import espalier_pb2 as pb
from espalier_server.exchange import Exchange
from espalier_server.inquiries import send_once
from espalier_server.window_aggregator import WindowAggregator
from espalier_server.window_outcome import WindowOutcome

CLIENTS = 3


@dataclass
class EdgeScene:
    """One window at one edge: what it was sent, who is below it, and what they answered."""

    edge: str
    plan: pb.WindowPlan
    payload: Payload
    known: dict[str, Member]
    replies: dict[tuple[int, str, str], RecordDict]

    @property
    def clients(self) -> list[str]:
        """Those whose reply counts."""
        mine = {p.client for r in self.plan.rounds for p in r.participants if p.edge == self.edge}
        return sorted({c for _, c, inquiry in self.replies if c in mine and not inquiry})

    def unsigned(self) -> EdgeScene:
        """Return the same where nobody signs and nobody need to: all checks but the signature's are on trial."""
        plan = pb.WindowPlan()
        plan.CopyFrom(self.plan)
        plan.settings.fields["require-signatures"].CopyFrom(Value(bool_value=False))
        return EdgeScene(
            self.edge, plan, self.payload, self.known, {k: bare(c) for k, c in self.replies.items()}
        )

    def play(self, client: str = "", content: RecordDict | None = None) -> tuple[pb.EdgeReport, Payload]:
        """Run the window; a client named here answers with `content`, or not at all."""
        replies = dict(self.replies)
        for key in [k for k in replies if k[1] == client and not k[2]]:
            del replies[key]
            if content is not None:
                replies[key] = content
        grid, roster = Replay(replies), cast(Roster, Fixed(self.known))
        return EdgeWindow(self.edge, self.plan, self.payload, cast(Any, grid), roster, EdgeProgress()).run()


def bare(content: RecordDict) -> RecordDict:
    """Return a reply's content without its signature."""
    report = pb.ClientReport.FromString(cast(bytes, content.config_records[control.REPORT][control.PLAN]))
    report.ClearField("signed")
    changed = RecordDict(dict(content.items()))
    changed[control.REPORT] = ConfigRecord({control.PLAN: report.SerializeToString()})
    return changed


class Fixed:
    """A roster that does not change."""

    def __init__(self, known: dict[str, Member]) -> None:
        self._known = known
        self._names = {k.node_id: n for n, k in known.items()}

    def clients(self) -> dict[str, Member]:
        return self._known

    def name_of(self, node_id: int) -> str:
        return self._names.get(node_id, f"node {node_id}")


class Replay:
    """A grid that gives the kept answers."""

    closed, late = False, 0

    def __init__(self, replies: dict[tuple[int, str, str], RecordDict]) -> None:
        self._replies = replies

    def exchange(self, messages: Iterable[Message], **_: Any) -> Iterator[Message]:
        for message in messages:
            plan = pb.RoundPlan.FromString(control.plan_bytes(message) or b"")
            content = self._replies.get((plan.round, plan.client, plan.inquiry))
            if content is not None:
                yield Message(content, reply_to=message)


@dataclass
class CloudScene:
    """One window at the cloud: its strategy as it stood, and the edges' reports."""

    strategy: WindowAggregator
    exchange: Exchange
    drawn: Any
    state: CloudState
    replies: dict[int, RecordDict]
    tree: Any

    def play(self, node: int = 0, content: RecordDict | None = None) -> tuple[WindowOutcome, CloudState, int]:
        """Collect the window and move on; an edge named here answers with `content`, or not at all."""
        strategy = copy.copy(self.strategy)
        strategy.tree = copied(self.tree)
        strategy.drawn, strategy.outcome = self.drawn, WindowOutcome()
        strategy.state, strategy.reached = copy.deepcopy(self.state), dict(strategy.reached)
        strategy.selection = copy.deepcopy(self.strategy.selection)
        strategy._exchange = replace(
            self.exchange,
            method=strategy.method,
            state=strategy.state,
            tree=strategy.tree,
            outcome=strategy.outcome,
        )
        replies = dict(self.replies)
        if node:
            del replies[node]
            if content is not None:
                replies[node] = content
        messages = [
            Message(c, reply_to=Message(RecordDict(), n, control.TRAIN)) for n, c in sorted(replies.items())
        ]
        merged, samples = strategy.collect(messages)
        strategy.advance(merged, samples)
        return strategy.outcome, strategy.state, samples

    def unsigned(self) -> CloudScene:
        """Return the same where nobody signs and nobody need to."""
        strategy = copy.copy(self.strategy)
        strategy.method = copy.copy(strategy.method)
        strategy.settings = strategy.settings.model_copy(update={"require_signatures": False})
        strategy.method.settings = strategy.settings
        replies = {}
        for node, content in self.replies.items():
            report = pb.EdgeReport.FromString(
                cast(bytes, content.config_records[control.REPORT][control.PLAN])
            )
            for client in (c for r in report.rounds for c in r.clients):
                client.ClearField("signed")
            replies[node] = RecordDict(dict(content.items()))
            replies[node][control.REPORT] = ConfigRecord({control.PLAN: report.SerializeToString()})
        return replace(self, strategy=strategy, replies=replies)


def copied(tree: Any) -> Any:
    """Return a tree of the same grid and registries whose tables are its own."""
    twin = copy.copy(tree)
    for name, value in vars(tree).items():
        if isinstance(value, dict | list | set):
            setattr(twin, name, copy.deepcopy(value) if name == "_untold" else copy.copy(value))
    return twin


@dataclass
class InquiryScene:
    """One question of the cloud to the clients, and what the edges answered."""

    exchange: Exchange
    state: CloudState
    tree: Any
    replies: dict[int, RecordDict] = field(default_factory=dict)

    def play(self, node: int = 0, content: RecordDict | None = None) -> tuple[WindowOutcome, dict[str, Any]]:
        """Put the question again; an edge named here answers with `content`, or not at all."""
        tree, outcome = copied(self.tree), WindowOutcome()
        replies = self.replies | ({node: content} if node else {})
        tree.grid = cast(Any, Answers(replies, self.tree.grid))
        # The same plan, for the answers are signed for it.
        found, _ = send_once(
            replace(self.exchange, tree=tree, state=copy.deepcopy(self.state), outcome=outcome)
        )
        return outcome, found


class Answers:
    """A cloud's grid that gives the kept answers; None is none."""

    def __init__(self, replies: Mapping[int, RecordDict | None], grid: Any) -> None:
        self._replies, self._grid = replies, grid

    def get_nodes(self) -> Any:
        return self._grid.get_nodes()

    def get_node_ids(self) -> Any:
        return self._grid.get_node_ids()

    def exchange(self, messages: Iterable[Message], **_: Any) -> Iterator[Message]:
        for message in messages:
            content = self._replies.get(message.metadata.dst_node_id)
            if content is not None:
                yield Message(content, reply_to=message)


@dataclass
class Recording:
    """A run's windows and questions at its edges and at its cloud."""

    settings: dict[str, Any]
    edges: list[EdgeScene] = field(default_factory=list)
    clouds: list[CloudScene] = field(default_factory=list)
    inquiries: list[InquiryScene] = field(default_factory=list)


def record(folder: Path, **settings: Any) -> Recording:
    """Run a tree of one edge with three clients and one with two, and keep what crossed its links."""
    found = Recording(settings)
    clients = [
        LocalClient(f"c{i}", f"digits:{i}/40", (0,) if i < CLIENTS else (1,)) for i in range(CLIENTS + 2)
    ]
    tree = LocalTree(folder, clients, 2)
    answers: dict[str, dict[tuple[int, str, str], RecordDict]] = {}
    for below in tree.edges:
        for node in below:
            node.app = _kept(node.app, answers)
    run_window, collect = EdgeWindow.run, WindowAggregator.collect

    def run(self: EdgeWindow) -> tuple[pb.EdgeReport, Payload]:
        payload, known = self.server.payload, self._roster.clients()
        result = run_window(self)
        rounds = {r.round for r in self.plan.rounds}
        replies = {k: c for k, c in answers[self.edge].items() if k[0] in rounds}
        found.edges.append(EdgeScene(self.edge, self.plan, payload, known, replies))
        return result

    def collected(self: WindowAggregator, replies: Iterable[Message]) -> Any:
        kept = list(replies)
        scene = CloudScene(
            self,
            self._exchange,
            copy.copy(self.drawn),
            copy.deepcopy(self.state),
            {m.metadata.src_node_id: m.content for m in kept},
            copied(self.tree),
        )
        found.clouds.append(scene)
        return collect(self, kept)

    def asked(exchange: Exchange) -> Any:
        tree = exchange.tree
        scene = InquiryScene(exchange, copy.deepcopy(exchange.state), copied(tree))
        found.inquiries.append(scene)
        through = tree.grid.exchange

        def listen(messages: Iterable[Message], **options: Any) -> Iterator[Message]:
            for reply in through(messages, **options):
                scene.replies[reply.metadata.src_node_id] = reply.content
                yield reply

        with mock.patch.object(tree.grid, "exchange", listen):
            return send_once(exchange)

    whole: dict[str, Any] = {
        "model": "mlp",
        "rounds": 2,
        "rg": 1,
        "min-edges": 2,
        "min-clients": 5,
        "batch-size": 16,
    }
    whole |= {"edge-choice": "random", "seed": 5, **settings}
    with (
        mock.patch.object(EdgeWindow, "run", run),
        mock.patch.object(WindowAggregator, "collect", collected),
        mock.patch("espalier_server.inquiries.send_once", asked),
    ):
        tree.run("fuzz", whole)
    return found


def _kept(app: Any, answers: dict[str, dict[tuple[int, str, str], RecordDict]]) -> Any:
    def answer(message: Message, context: Any) -> Message:
        reply: Message = app(message, context)
        data = control.plan_bytes(message)
        if data is not None and reply.has_content():
            plan = pb.RoundPlan.FromString(data)
            content = RecordDict(dict(reply.content.items()))
            answers.setdefault(plan.edge, {})[plan.round, plan.client, plan.inquiry] = content
        return reply

    return answer


def finite(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether every number is finite."""
    return all(bool(np.isfinite(a).all()) for a in tensors.values() if a.dtype.kind == "f")


def all_finite(sections: Sections) -> bool:
    """Whether every number of a payload is finite."""
    return all(finite(tensors) for tensors in sections.values())
