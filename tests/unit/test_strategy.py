"""A window at the cloud: what goes to the edges, and which reports are taken."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.supercore.task_identity import TaskIdentity

from common.methods.base import CloudState
from common.methods.planning import Member
from common.methods.registry import create_method
from common.run.config import RunConfig
from common.wire import control
from common.wire.payload import Weights
from proto import espalier_pb2 as pb
from server.strategy import WindowStrategy

TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
NODES = {"east": 101, "west": 102}


class FakeTree:
    """Two edges and two clients, one reachable at each."""

    classes = ("cat", "dog")

    def __init__(self) -> None:
        self.learnt: list[str] = []

    def edges(self) -> dict[str, int]:
        return NODES

    def members(self) -> list[Member]:
        return [
            Member("a", 10, np.array([10.0, 0.0]), ("east",)),
            Member("b", 30, np.array([15.0, 15.0]), ("west",)),
        ]

    def learn(self, node_id: int, hello: pb.EdgeHello) -> None:
        self.learnt.append(hello.name)


def strategy(**settings: Any) -> WindowStrategy:
    config = RunConfig.from_flat({"method": "fedavg", "rounds": 6, "rg": 2, **settings})
    weights = Weights.pack({"w": np.zeros(3, np.float32)})
    architecture = pb.ArchitectureSpec(tensors=weights.layout.to_proto().tensors)
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
    record = made.rounds.add(round=3)
    record.clients.add(client={"east": "a", "west": "b"}[sender], samples=samples, loss=1.0)
    array = np.full(3, value, np.float32)
    for key, change in changes.items():
        if key == "array":
            array = change
        elif key == "client":
            record.clients[0].client = change
        elif key == "roster":
            made.roster.name = change
        elif key == "counts":
            made.labels.counts[:] = change
        else:
            setattr(made, key, change)
    content = control.report_content(made, Weights.pack({"w": array}).to_record(), samples, 1.0)
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
        ({"client": "b"}, "updates of ['b'], which it was not given"),
        ({"counts": [1.0, 2.0, 3.0]}, "a label distribution of 3 counts for 2 classes"),
        ({"counts": [-1.0, 2.0]}, "a bad count"),
        ({"counts": []}, "samples without a label distribution"),
        ({"array": np.array([0, np.nan, 0], np.float32)}, "not finite"),
        ({"array": np.zeros(2, np.float32)}, "shape (2,), expected (3,)"),
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


def test_a_silent_edge_is_a_straggler_and_nobody_leaves_the_model_as_it_was() -> None:
    made = strategy()
    sent(made)
    arrays, _ = made.aggregate_train(2, iter(()))
    assert arrays is None
    assert [(f.node, f.kind) for f in made.outcome.faults] == [("east", "straggler"), ("west", "straggler")]
    np.testing.assert_array_equal(made.state.weights.views()["w"], 0)
    assert made.state.window == 2


def test_an_edge_that_trained_nobody_weighs_nothing() -> None:
    made = strategy(**{"method": "fedphd", "pruning-ratio": 0})
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
