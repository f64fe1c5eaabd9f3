"""A window at the cloud: what goes to the edges, and which reports are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.supercore.task_identity import TaskIdentity

from espalier.methods.aggregate import FORWARDED, NOMINAL, SUMS, WEIGHTS, Aggregate
from espalier.methods.base import CloudState
from espalier.methods.planning import Member
from espalier.methods.registry import create_method
from espalier.methods.run_config import RunConfig
from espalier.methods.scaffold import CONTROL
from espalier.wire import control
from espalier.wire.payload import Layout
from espalier.wire.sections import GRADIENT, MODEL, Payload, SectionId, Sections, layouts_to_proto
from espalier_proto import espalier_pb2 as pb
from espalier_server.window_aggregator import WindowAggregator

TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
NODES = {"east": 101, "west": 102}


class FakeGrid:
    """Answers what edges are sent by `answer`, and keeps the plans."""

    def __init__(self) -> None:
        self.answer: Callable[[str, Message], Message | None] = lambda edge, message: None
        self.plans: dict[str, pb.WindowPlan] = {}

    def exchange(self, messages: Iterable[Message], **_: Any) -> Iterator[Message]:
        for message in messages:
            edge = {v: k for k, v in NODES.items()}[message.metadata.dst_node_id]
            data = control.plan_bytes(message)
            assert data is not None
            self.plans[edge] = control.decode(pb.WindowPlan, data, "cloud")
            if (reply := self.answer(edge, message)) is not None:
                yield reply


class FakeTree:
    """Two edges and two clients, one reachable at each."""

    classes = ("cat", "dog")
    population = 2
    image_shape = (1, 8, 8)

    def __init__(self) -> None:
        self.learnt: list[str] = []
        self.keys = SimpleNamespace(in_force=dict)
        self.grid = FakeGrid()

    def edges(self) -> dict[str, int]:
        return NODES

    def name_of(self, node_id: int) -> str:
        return {node: name for name, node in NODES.items()}[node_id]

    def members(self) -> list[Member]:
        return [
            Member("a", 10, np.array([10.0, 0.0]), ("east",)),
            Member("b", 30, np.array([15.0, 15.0]), ("west",)),
        ]

    def learn(self, node_id: int, hello: pb.EdgeHello) -> None:
        self.learnt.append(hello.name)


def aggregator(sections: Sections | None = None, **settings: Any) -> WindowAggregator:
    unsigned: dict[str, Any] = {"method": "fedavg", "rounds": 6, "rg": 2, "require-signatures": False}
    config = RunConfig.from_flat(unsigned | settings)
    network = {"w": np.zeros(3, np.float32), **dict((sections or {}).get(MODEL, {}))}
    further = {s: arrays for s, arrays in (sections or {}).items() if s != MODEL}
    architecture = pb.ArchitectureSpec(tensors=Layout.of({"w": network["w"]}).to_proto().tensors)
    state = CloudState(architecture, Payload.pack({MODEL: network, **further}), window=1, round=2)
    return WindowAggregator(create_method(config), state, cast(Any, FakeTree()), "r", {"a": (1, 2)})


def sent(made: WindowAggregator) -> dict[str, Message]:
    made.draw()
    found = {}
    for message in made.send():
        name = {v: k for k, v in NODES.items()}[message.metadata.dst_node_id]
        found[name] = message
    return found


def take(made: WindowAggregator, replies: Iterable[Message]) -> None:
    """Collect the reports of a window and advance by them."""
    made.advance(*made.collect(replies))


def forwarded(section: SectionId, client: str) -> SectionId:
    return SectionId(section.name, client, FORWARDED)


def report(message: Message, sender: str, value: float, samples: int, **changes: Any) -> Message:
    labels = [samples, 0.0] if sender == "east" else [samples / 2, samples / 2]
    made = pb.EdgeReport(schema=control.SCHEMA, run="r", window=2, edge=sender, samples=samples)
    made.labels.counts.extend(labels if samples else [])
    record, flat = made.rounds.add(round=3), None
    record.clients.add(client={"east": "a", "west": "b"}[sender], samples=samples, loss=1.0)
    aggregate = Aggregate({MODEL: Layout.of({"w": np.zeros(3, np.float32)})})
    aggregate.mean({MODEL: {"w": np.full(3, value, np.float32)}}, samples)
    payload, scalars = aggregate.report()
    made.metrics.update(scalars)
    for key, change in changes.items():
        if key == "sections":
            payload = Payload.pack(change)
        elif key == "flat":
            flat = change
        elif key == "client":
            record.clients[0].client = change
        elif key == "roster":
            made.roster.name = change
        elif key == "counts":
            made.labels.counts[:] = change
        elif key == "metrics":
            made.metrics.update(change)
        else:
            setattr(made, key, change)
    made.sections.extend(layouts_to_proto(payload.layouts))
    content = control.report_content(made, flat or payload, samples, 1.0)
    return Message(content, reply_to=message)


def test_every_edge_gets_the_plan_with_the_states_to_start_from() -> None:
    made = aggregator()
    messages = sent(made)
    assert set(messages) == {"east", "west"}
    data = control.plan_bytes(messages["east"])
    assert data is not None
    plan = control.decode(pb.WindowPlan, data, "cloud")
    assert (plan.run, plan.window, plan.checkpoint_window) == ("r", 2, 1)
    assert [r.round for r in plan.rounds] == [3, 4]
    starts = {
        (p.client, r.round): (p.start.window, p.start.round) for r in plan.rounds for p in r.participants
    }
    # a has a state of round 2, b none; in round 4 both go on from round 3 of this window.
    assert starts == {("a", 3): (1, 2), ("b", 3): (0, 0), ("a", 4): (2, 3), ("b", 4): (2, 3)}
    assert messages["east"].content is messages["west"].content


def test_reports_become_the_next_model() -> None:
    made = aggregator()
    messages = sent(made)
    replies = [
        report(messages["east"], "east", 1.0, 20, roster="east"),
        report(messages["west"], "west", 4.0, 60, roster="west"),
    ]
    take(made, iter(replies))
    np.testing.assert_allclose(made.state.weights.views()["w"], (20 * 1 + 60 * 4) / 80)
    assert (made.state.window, made.state.round) == (2, 4)
    assert made.outcome.rho == pytest.approx({"east": 0.25, "west": 0.75})
    assert made.outcome.mu == pytest.approx({"east": 2 - 0.5**0.5, "west": 2.0})
    assert made.reached == {"a": (2, 3), "b": (2, 3)}
    assert not made.outcome.faults
    assert cast(FakeTree, made.tree).learnt == ["east", "west"]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"edge": "west"}, "a report in the name of 'west'"),
        ({"run": "other"}, "a reply to run 'other'"),
        ({"window": 1}, "window 1"),
        ({"roster": "west"}, "a list of clients in the name of 'west'"),
        ({"client": "b"}, "an update of 'b' in round 3, which was not planned there"),
        ({"counts": [1.0, 2.0, 3.0]}, "a label distribution of 3 counts for 2 classes"),
        ({"counts": [-1.0, 2.0]}, "an invalid count"),
        ({"counts": []}, "samples without a label distribution"),
        ({"sections": {MODEL: {"w": np.array([0, np.nan, 0], np.float32)}}}, "not finite"),
        ({"flat": Payload.pack({MODEL: {"w": np.zeros(2, np.float32)}})}, "shape (2,), expected (3,)"),
        (
            {"sections": {MODEL: {"w": np.ones(2, np.float32)}}},
            "tensor 'w' has shape [2], the server's is [3]",
        ),
        (
            {"sections": {MODEL: {"w": np.ones(1, np.float32)}}},
            "tensor 'w' has shape [1], the server's is [3]",
        ),
        ({"sections": {MODEL: {"w": np.ones(3, np.int64)}}}, "tensor 'w' is int64, the server's is float32"),
        ({"sections": {MODEL: {"x": np.ones(3, np.float32)}}}, "tensor 'x' is not one of the server's"),
        (
            {"sections": {MODEL._replace(record=SUMS): {"x": np.ones(3, np.float32)}}},
            "tensor 'x' is not one of the server's",
        ),
        (
            {"sections": {SectionId("other"): {"w": np.ones(3, np.float32)}}},
            "tensor 'w' of other is not one of the server's",
        ),
        (
            {"sections": {SectionId("model", record="guesses"): {"w": np.ones(3, np.float32)}}},
            "the unknown record 'guesses'",
        ),
        ({"sections": {SectionId("Model"): {"w": np.ones(3, np.float32)}}}, "section or record name 'Model'"),
        (
            {"sections": {SectionId("config"): {"w": np.ones(3, np.float32)}}},
            "section or record name 'config'",
        ),
        (
            {"sections": {SectionId("other", record="espalier"): {"w": np.ones(3, np.float32)}}},
            "section or record name 'espalier'",
        ),
        (
            {"sections": {forwarded(GRADIENT, "b"): {"w": np.ones(3, np.float32)}}},
            "tensors of ['b'], which are not its participants",
        ),
        ({"metrics": {NOMINAL: -1.0}}, "the aggregation weight -1.0"),
        ({"metrics": {NOMINAL: float("nan")}}, "the aggregation weight nan"),
        ({"metrics": {"count/depth1": float("inf")}}, "the count 'depth1' is not finite"),
        (
            {
                "sections": {
                    MODEL: {"w": np.ones(3, np.float32)},
                    MODEL._replace(record=WEIGHTS): {"w": np.array([1.0, -1.0, 1.0])},
                }
            },
            "the weights of tensor 'w' are negative",
        ),
        ({"schema": 7}, "of schema 7"),
    ],
)
def test_a_bad_report_is_refused_by_name_and_the_window_goes_on(changes: dict[str, Any], fault: str) -> None:
    made = aggregator()
    messages = sent(made)
    bad = report(messages["east"], "east", 9.0, 20, **changes)
    take(made, iter([bad, report(messages["west"], "west", 4.0, 60)]))
    [found] = made.outcome.faults
    assert (found.tier, found.node, found.kind, found.window) == ("cloud", "east", "refused", 2)
    assert fault in found.detail
    np.testing.assert_allclose(made.state.weights.views()["w"], 4.0)


def test_a_silent_edge_is_a_straggler_and_nobody_leaves_the_model_as_it_was() -> None:
    made = aggregator()
    sent(made)
    take(made, iter(()))
    assert [(f.node, f.kind) for f in made.outcome.faults] == [("east", "straggler"), ("west", "straggler")]
    np.testing.assert_array_equal(made.state.weights.views()["w"], 0)
    assert made.state.window == 2


def test_a_window_in_which_nobody_trained_may_be_repeated() -> None:
    made = aggregator()
    made.may_repeat = True
    messages = sent(made)
    take(made, iter([report(messages["east"], "east", 9.0, 0)]))
    assert (made.state.window, made.state.round) == (1, 2)
    assert [(f.node, f.kind) for f in made.outcome.faults] == [("west", "straggler")]
    messages = sent(made)
    take(made, iter([report(messages["west"], "west", 4.0, 60)]))
    assert (made.state.window, made.state.round) == (2, 4)
    np.testing.assert_allclose(made.state.weights.views()["w"], 4.0)


def test_an_edge_that_trained_nobody_weighs_nothing() -> None:
    made = aggregator(None, **{"method": "fedphd", "pruning-ratio": 0})
    messages = sent(made)
    empty = report(messages["east"], "east", 9.0, 0)
    take(made, iter([empty, report(messages["west"], "west", 4.0, 60)]))
    assert made.outcome.rho == {"west": 1.0}
    np.testing.assert_allclose(made.state.weights.views()["w"], 4.0)


def test_arrays_are_flat() -> None:
    message = sent(aggregator())["east"]
    record = message.content["arrays"]
    assert isinstance(record, ArrayRecord)
    assert list(record) == ["float32"]
    assert isinstance(message.content["config"], ConfigRecord)
    assert message.metadata.group_id == "2"


def test_a_mean_over_all_clients_counts_those_who_join_as_zeros() -> None:
    """SCAFFOLD's c is the mean of all c_k: with half as many clients again it is 2/3 of what it was."""
    made = aggregator({CONTROL: {"w": np.full(3, 6, np.float32)}}, method="scaffold", model="cnn")
    made.state.population = 2
    made.draw()
    np.testing.assert_array_equal(made.state.section(CONTROL)["w"], 6)
    cast(FakeTree, made.tree).population = 3
    made.draw()
    np.testing.assert_allclose(made.state.section(CONTROL)["w"], 4)
    np.testing.assert_array_equal(made.state.tensors["w"], 0)
    assert made.state.population == 3
    messages = list(made.send())
    data = control.plan_bytes(messages[0])
    assert control.decode(pb.WindowPlan, data, "cloud").population == 3


# --- clients that are asked ------------------------------------------------------------------------------


def told(message: Message, sender: str, losses: dict[str, float], **changes: Any) -> Message:
    """Answer as an edge whose clients have these losses, and gradients of the same value."""
    made = pb.EdgeReport(schema=control.SCHEMA, run="r", window=2, edge=sender)
    record = made.rounds.add(round=3)
    sections = {}
    for client, loss in losses.items():
        record.clients.add(client=client, samples=10, loss=loss, metrics={"total": 7})
        sections[forwarded(GRADIENT, client)] = {"w": np.full(3, loss, np.float32)}
    payload = Payload.pack(changes.pop("sections", sections))
    made.sections.extend(layouts_to_proto(payload.layouts))
    for key, change in changes.items():
        setattr(made, key, change)
    return Message(control.report_content(made, payload, 1, 1.0), reply_to=message)


def test_asking_reaches_clients_through_their_edges() -> None:
    made = aggregator()
    tree = cast(FakeTree, made.tree)
    tree.grid.answer = lambda edge, m: told(m, edge, {"a": 1.0} if edge == "east" else {"b": 3.0})
    answers = made.ask("gradient", made.state.architecture, made.state.payload)
    assert {c: a.metrics for c, a in answers.items()} == {
        "a": {"loss": 1.0, "total": 7.0},
        "b": {"loss": 3.0, "total": 7.0},
    }
    assert {c: {n: v.tolist() for n, v in a.arrays.items()} for c, a in answers.items()} == {
        "a": {"w": [1.0] * 3},
        "b": {"w": [3.0] * 3},
    }
    plan = tree.grid.plans["east"]
    assert plan.inquiry == "gradient"
    assert {
        (p.client, p.edge, p.start.window, p.start.round) for r in plan.rounds for p in r.participants
    } == {("a", "east", 1, 2), ("b", "west", 0, 0)}
    # Asking moves nothing on, and its bytes count.
    assert (made.state.window, made.state.round, made.reached) == (1, 2, {"a": (1, 2)})
    # Measured where they are received: two reports with 3 floats each.
    assert 2 * 12 < made.outcome.ledger.as_dict()["edge-cloud"]["up_bytes"] < 2 * 1000
    assert set(made.ask("gradient", made.state.architecture, made.state.payload, ["a"])) == {"a"}


@pytest.mark.parametrize(
    ("losses", "changes", "fault"),
    [
        ({"b": 1.0}, {}, "an update of 'b' in round 3, which was not planned there"),
        ({"a": 1.0}, {"sections": {}}, "an answer of a: section gradient: tensor 'w' is missing"),
        (
            {"a": 1.0},
            {"sections": {forwarded(SectionId("guess"), "a"): {"w": np.ones(3, np.float32)}}},
            "an answer of a: section gradient: tensor 'w' is missing",
        ),
        (
            {"a": 1.0},
            {"sections": {forwarded(GRADIENT, "a"): {"w": np.ones(1, np.float32)}}},
            "an answer of a: section gradient: tensor 'w' is",
        ),
        (
            {"a": 1.0},
            {"sections": {forwarded(GRADIENT, "b"): {"w": np.ones(3, np.float32)}}},
            "tensors of ['b']",
        ),
        ({"a": 1.0}, {"run": "other"}, "a reply to run 'other'"),
        ({"a": 1.0}, {"edge": "west"}, "a report in the name of 'west'"),
    ],
)
def test_an_unsound_answer_is_refused_by_the_edges_name(
    losses: dict[str, float], changes: dict[str, Any], fault: str
) -> None:
    made = aggregator()
    cast(FakeTree, made.tree).grid.answer = lambda edge, m: (
        told(m, edge, {"b": 3.0}) if edge == "west" else told(m, edge, losses, **changes)
    )
    answers = made.ask("gradient", made.state.architecture, made.state.payload)
    assert set(answers) == {"b"}
    [found] = made.outcome.faults
    assert (found.node, found.kind) == ("east", "refused")
    assert fault in found.detail


def test_the_clients_of_largest_loss_train_in_the_first_round_and_edges_choose_in_the_second() -> None:
    made = aggregator(fraction=0.5, selection="pow-d")
    cast(FakeTree, made.tree).grid.answer = lambda edge, m: told(
        m, edge, {"a": 1.0} if edge == "east" else {"b": 3.0}, sections={}
    )
    drawn = made.draw()
    assert cast(FakeTree, made.tree).grid.plans["west"].inquiry == "loss"
    assert drawn.rounds == [{"b": "west"}, {"a": "east", "b": "west"}]
    assert drawn.keeps == [0, 1]


def test_everyone_gets_the_part_the_method_assigns() -> None:
    """FedDiffuse gives all clients one view; the plan says it once."""
    made = aggregator({MODEL: {"up_blocks.w": np.zeros(2, np.float32)}}, method="feddiffuse", exchange="udec")
    made.draw()
    [message, _] = made.send()
    data = control.plan_bytes(message)
    assert data is not None
    plan = control.decode(pb.WindowPlan, data, "cloud")
    assert {p.view for r in plan.rounds for p in r.participants} == {"shared"} == set(plan.views)
    # w belongs to the way down, which UDEC leaves at home.
    assert [(s.name, [t.name for t in s.layout.tensors]) for s in plan.views["shared"].sections] == [
        ("model", ["up_blocks.w"])
    ]
