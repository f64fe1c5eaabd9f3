"""A window at the cloud: what goes to the edges, and which reports are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.supercore.task_identity import TaskIdentity

from espalier.methods.base import CloudState
from espalier.methods.planning import Member
from espalier.methods.registry import create_method
from espalier.methods.run_config import RunConfig
from espalier.methods.tally import NOMINAL, Tally
from espalier.wire import control
from espalier.wire.payload import Weights
from espalier_proto import espalier_pb2 as pb
from espalier_server.strategy import WindowStrategy

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


def strategy(sections: dict[str, np.ndarray] | None = None, **settings: Any) -> WindowStrategy:
    unsigned: dict[str, Any] = {"method": "fedavg", "rounds": 6, "rg": 2, "require-signatures": False}
    config = RunConfig.from_flat(unsigned | settings)
    sections = sections or {}
    model = {"w": np.zeros(3, np.float32)}
    architecture = pb.ArchitectureSpec(tensors=Weights.pack(model).layout.to_proto().tensors)
    weights = Weights.pack(model | sections)
    state = CloudState(architecture, weights, window=1, round=2)
    return WindowStrategy(create_method(config), state, cast(Any, FakeTree()), "r", {"a": (1, 2)})


def sent(made: WindowStrategy) -> dict[str, Message]:
    made.draw()
    arrays = made.state.weights.to_record()
    found = {}
    for message in made.configure_train(2, arrays, ConfigRecord(), cast(Any, None)):
        name = {v: k for k, v in NODES.items()}[message.metadata.dst_node_id]
        found[name] = message
    return found


def report(message: Message, sender: str, value: float, samples: int, **changes: Any) -> Message:
    labels = [samples, 0.0] if sender == "east" else [samples / 2, samples / 2]
    made = pb.EdgeReport(schema=control.SCHEMA, run="r", window=2, edge=sender, samples=samples, up_bytes=12)
    made.labels.counts.extend(labels if samples else [])
    record, flat = made.rounds.add(round=3), None
    record.clients.add(client={"east": "a", "west": "b"}[sender], samples=samples, loss=1.0)
    tally = Tally(Weights.pack({"w": np.zeros(3, np.float32)}).layout)
    tally.mean({"w": np.full(3, value, np.float32)}, samples)
    payload, scalars = tally.report()
    made.metrics.update(scalars)
    arrays = payload.views()
    for key, change in changes.items():
        if key == "arrays":
            arrays = change
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
    weights = Weights.pack(arrays)
    made.layout.CopyFrom(weights.layout.to_proto())
    content = control.report_content(made, (flat or weights).to_record(), samples, 1.0)
    return Message(content, reply_to=message)


def test_every_edge_gets_the_plan_with_the_states_to_start_from() -> None:
    made = strategy()
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
    made = strategy()
    messages = sent(made)
    replies = [
        report(messages["east"], "east", 1.0, 20, roster="east"),
        report(messages["west"], "west", 4.0, 60, roster="west"),
    ]
    arrays, metrics = made.aggregate_train(2, iter(replies))
    assert arrays is not None
    assert metrics is not None
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
        ({"client": "b"}, "an update of 'b' in round 3, who was not planned there"),
        ({"counts": [1.0, 2.0, 3.0]}, "a label distribution of 3 counts for 2 classes"),
        ({"counts": [-1.0, 2.0]}, "a bad count"),
        ({"counts": []}, "samples without a label distribution"),
        ({"arrays": {"w": np.array([0, np.nan, 0], np.float32)}}, "not finite"),
        ({"flat": Weights.pack({"w": np.zeros(2, np.float32)})}, "shape (2,), expected (3,)"),
        ({"arrays": {"w": np.ones(2, np.float32)}}, "tensor 'w' has shape [2], the server's is [3]"),
        ({"arrays": {"w": np.ones(1, np.float32)}}, "tensor 'w' has shape [1], the server's is [3]"),
        ({"arrays": {"w": np.ones(3, np.int64)}}, "tensor 'w' is int64, the server's is float32"),
        ({"arrays": {"x": np.ones(3, np.float32)}}, "tensor 'x' is none of the server's"),
        ({"arrays": {"sum/x": np.ones(3, np.float32)}}, "tensor 'x' is none of the server's"),
        (
            {"arrays": {"@b/gradient/w": np.ones(3, np.float32)}},
            "tensors of ['b'], which it was not given",
        ),
        ({"metrics": {NOMINAL: -1.0}}, "the aggregation weight -1.0"),
        ({"metrics": {NOMINAL: float("nan")}}, "the aggregation weight nan"),
        ({"metrics": {"count/depth1": float("inf")}}, "the count 'depth1' is not finite"),
        (
            {"arrays": {"w": np.ones(3, np.float32), "weight/w": np.array([1.0, -1.0, 1.0])}},
            "the weights of tensor 'w' are negative",
        ),
        ({"schema": 7}, "of schema 7"),
    ],
)
def test_a_bad_report_is_refused_by_name_and_the_window_goes_on(changes: dict[str, Any], fault: str) -> None:
    made = strategy()
    messages = sent(made)
    bad = report(messages["east"], "east", 9.0, 20, **changes)
    made.aggregate_train(2, iter([bad, report(messages["west"], "west", 4.0, 60)]))
    [found] = made.outcome.faults
    assert (found.tier, found.node, found.kind, found.window) == ("cloud", "east", "refused", 2)
    assert fault in found.detail
    np.testing.assert_allclose(made.state.weights.views()["w"], 4.0)


def test_a_silent_edge_is_a_straggler() -> None:
    made = strategy()
    sent(made)
    arrays, _ = made.aggregate_train(2, iter(()))
    assert arrays is None
    assert [(f.node, f.kind) for f in made.outcome.faults] == [("east", "straggler"), ("west", "straggler")]
    np.testing.assert_array_equal(made.state.weights.views()["w"], 0)
    assert made.state.window == 2


def test_a_window_in_which_nobody_trained_may_be_repeated() -> None:
    made = strategy()
    made.may_repeat = True
    messages = sent(made)
    made.aggregate_train(2, iter([report(messages["east"], "east", 9.0, 0)]))
    assert (made.state.window, made.state.round) == (1, 2)
    assert [(f.node, f.kind) for f in made.outcome.faults] == [("west", "straggler")]
    messages = sent(made)
    made.aggregate_train(2, iter([report(messages["west"], "west", 4.0, 60)]))
    assert (made.state.window, made.state.round) == (2, 4)
    np.testing.assert_allclose(made.state.weights.views()["w"], 4.0)


def test_an_edge_that_trained_nobody_weighs_nothing() -> None:
    made = strategy(None, **{"method": "fedphd", "pruning-ratio": 0})
    messages = sent(made)
    empty = report(messages["east"], "east", 9.0, 0)
    made.aggregate_train(2, iter([empty, report(messages["west"], "west", 4.0, 60)]))
    assert made.outcome.rho == {"west": 1.0}
    np.testing.assert_allclose(made.state.weights.views()["w"], 4.0)


def test_arrays_are_flat() -> None:
    message = sent(strategy())["east"]
    record = message.content["arrays"]
    assert isinstance(record, ArrayRecord)
    assert list(record) == ["float32"]
    assert isinstance(message.content["config"], ConfigRecord)
    assert message.metadata.group_id == "2"


def test_a_mean_over_all_clients_counts_those_who_join_as_zeros() -> None:
    """SCAFFOLD's c is the mean of all c_k: with half as many clients again it is 2/3 of what it was."""
    made = strategy({"control/w": np.full(3, 6, np.float32)}, method="scaffold", model="cnn")
    made.state.population = 2
    made.draw()
    np.testing.assert_array_equal(made.state.tensors["control/w"], 6)
    cast(FakeTree, made.tree).population = 3
    made.draw()
    np.testing.assert_allclose(made.state.tensors["control/w"], 4)
    np.testing.assert_array_equal(made.state.tensors["w"], 0)
    assert made.state.population == 3
    messages = list(made.configure_train(2, made.state.weights.to_record(), ConfigRecord(), cast(Any, None)))
    data = control.plan_bytes(messages[0])
    assert control.decode(pb.WindowPlan, data, "cloud").population == 3


# --- clients that are asked ------------------------------------------------------------------------------


def told(message: Message, sender: str, losses: dict[str, float], **changes: Any) -> Message:
    """Answer as an edge whose clients have these losses, and gradients of the same value."""
    made = pb.EdgeReport(schema=control.SCHEMA, run="r", window=2, edge=sender, up_bytes=5)
    record = made.rounds.add(round=3)
    arrays = {}
    for client, loss in losses.items():
        record.clients.add(client=client, samples=10, loss=loss, metrics={"total": 7})
        arrays[f"@{client}/gradient/w"] = np.full(3, loss, np.float32)
    weights = Weights.pack(changes.pop("arrays", arrays))
    made.layout.CopyFrom(weights.layout.to_proto())
    for key, change in changes.items():
        setattr(made, key, change)
    return Message(control.report_content(made, weights.to_record(), 1, 1.0), reply_to=message)


def test_asking_reaches_clients_through_their_edges() -> None:
    made = strategy()
    tree = cast(FakeTree, made.tree)
    tree.grid.answer = lambda edge, m: told(m, edge, {"a": 1.0} if edge == "east" else {"b": 3.0})
    answers = made.ask("gradient", made.state.architecture, made.state.weights)
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
    assert made.outcome.ledger.as_dict()["edge-cloud"]["up_bytes"] == 10
    assert set(made.ask("gradient", made.state.architecture, made.state.weights, ["a"])) == {"a"}


@pytest.mark.parametrize(
    ("losses", "changes", "fault"),
    [
        ({"b": 1.0}, {}, "an update of 'b' in round 3, who was not planned there"),
        ({"a": 1.0}, {"arrays": {}}, "an answer of a: tensor 'gradient/w' is missing"),
        (
            {"a": 1.0},
            {"arrays": {"@a/gradient/w": np.ones(1, np.float32)}},
            "an answer of a: tensor 'gradient/w' is",
        ),
        ({"a": 1.0}, {"arrays": {"@b/gradient/w": np.ones(3, np.float32)}}, "tensors of ['b']"),
        ({"a": 1.0}, {"run": "other"}, "a reply to run 'other'"),
        ({"a": 1.0}, {"edge": "west"}, "a report in the name of 'west'"),
    ],
)
def test_an_unsound_answer_is_refused_by_the_edges_name(
    losses: dict[str, float], changes: dict[str, Any], fault: str
) -> None:
    made = strategy()
    cast(FakeTree, made.tree).grid.answer = lambda edge, m: (
        told(m, edge, {"b": 3.0}) if edge == "west" else told(m, edge, losses, **changes)
    )
    answers = made.ask("gradient", made.state.architecture, made.state.weights)
    assert set(answers) == {"b"}
    [found] = made.outcome.faults
    assert (found.node, found.kind) == ("east", "refused")
    assert fault in found.detail


def test_largest_losses_train_and_edges_choose_in_round_two() -> None:
    made = strategy(fraction=0.5, selection="pow-d")
    cast(FakeTree, made.tree).grid.answer = lambda edge, m: told(
        m, edge, {"a": 1.0} if edge == "east" else {"b": 3.0}, arrays={}
    )
    drawn = made.draw()
    assert cast(FakeTree, made.tree).grid.plans["west"].inquiry == "loss"
    assert drawn.rounds == [{"b": "west"}, {"a": "east", "b": "west"}]
    assert drawn.keeps == [0, 1]


def test_everyone_gets_the_part_the_method_assigns() -> None:
    """FedDiffuse gives all clients one view; the plan says it once."""
    made = strategy({"up_blocks.w": np.zeros(2, np.float32)}, method="feddiffuse", exchange="udec")
    made.draw()
    [message, _] = made.configure_train(2, made.state.weights.to_record(), ConfigRecord(), cast(Any, None))
    data = control.plan_bytes(message)
    assert data is not None
    plan = control.decode(pb.WindowPlan, data, "cloud")
    assert {p.view for r in plan.rounds for p in r.participants} == {"shared"} == set(plan.views)
    # w belongs to the way down, which UDEC leaves at home.
    assert [t.name for t in plan.views["shared"].layout.tensors] == ["up_blocks.w"]
