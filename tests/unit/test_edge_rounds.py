"""A window at an edge with a grid that answers as told: sums, stragglers, refusals, versions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from common.errors import EspalierError, WireError
from common.run.config import RunConfig
from common.wire import control
from common.wire.payload import Weights
from edge.roster import Known, Roster
from edge.rounds import EdgeProgress, EdgeWindow
from proto import espalier_pb2 as pb

TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

SAMPLES = {"c1": 10, "c2": 30}
NODES = {"c1": 11, "c2": 22}
Answer = Callable[[pb.RoundPlan, Weights, Message], Message | None]


class FakeRoster:
    """Two clients that are always there."""

    def clients(self) -> dict[str, Known]:
        found = {}
        for name, node in NODES.items():
            labels = [SAMPLES[name], 0] if name == "c1" else [0, SAMPLES[name]]
            hello = pb.ClientHello(
                name=name,
                samples=SAMPLES[name],
                histogram=pb.LabelHistogram(counts=labels),
                classes=["a", "b"],
            )
            found[name] = Known(node, hello)
        return found

    def name_of(self, node_id: int) -> str:
        return {n: name for name, n in NODES.items()}.get(node_id, f"node {node_id}")


class FakeGrid:
    """Passes every message to `answer`; None is a straggler."""

    closed = False
    late = 0

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.plans: list[pb.RoundPlan] = []

    def exchange(self, messages: Iterable[Message], **_: Any) -> Iterator[Message]:
        for message in messages:
            data = control.plan_bytes(message)
            assert data is not None
            plan = control.decode(pb.RoundPlan, data, "edge")
            self.plans.append(plan)
            weights = control.read_weights(message, control.plan_layout(plan, "edge"), "edge")
            reply = self.answer(plan, weights, message)
            if reply is not None:
                yield reply


def reply_to(plan: pb.RoundPlan, message: Message, arrays: dict[str, np.ndarray], **changes: Any) -> Message:
    weights = Weights.pack(arrays)
    report = pb.ClientReport(
        schema=control.SCHEMA,
        run=plan.run,
        window=plan.window,
        round=plan.round,
        client=plan.client,
        samples=SAMPLES[plan.client],
        loss=0.5,
        up_bytes=100,
    )
    if changes.pop("with_layout", False):
        report.layout.CopyFrom(weights.layout.to_proto())
    for key, value in changes.items():
        setattr(report, key, value)
    return Message(
        control.report_content(report, weights.to_record(), report.samples, report.loss), reply_to=message
    )


def add_one(plan: pb.RoundPlan, weights: Weights, message: Message) -> Message:
    """Train as c1, which adds 1 to every weight, or as c2, which adds 2."""
    step = np.float32(1 if plan.client == "c1" else 2)
    return reply_to(plan, message, {n: v + step for n, v in weights.views().items()})


def window(
    answer: Answer, *, rounds: int = 1, quorum: int = 1, **settings: Any
) -> tuple[EdgeWindow, FakeGrid]:
    weights = Weights.pack({"w": np.zeros((2, 2), np.float32), "b": np.zeros(2, np.float32)})
    plan = pb.WindowPlan(
        schema=control.SCHEMA,
        run="r",
        window=3,
        settings=RunConfig.from_flat({"method": "fedavg", **settings}).to_struct(),
        layout=weights.layout.to_proto(),
        round_deadline=5,
        quorum=quorum,
        checkpoint_window=2,
    )
    for i in range(rounds):
        schedule = plan.rounds.add(round=11 + i)
        for client in NODES:
            schedule.participants.add(client=client, edge="edge-1", start=pb.Version(window=2, round=10))
        schedule.participants.add(client="elsewhere", edge="edge-2")
    grid = FakeGrid(answer)
    roster = cast(Roster, FakeRoster())
    return EdgeWindow("edge-1", plan, weights, cast(Any, grid), roster, EdgeProgress()), grid


def test_rounds_add_up() -> None:
    edge, _ = window(add_one, rounds=3)
    report = edge.run()
    # A round moves the model by (10·1 + 30·2) / 40 = 1.75.
    np.testing.assert_allclose(edge.weights.views()["w"], 3 * 1.75, rtol=1e-6)
    assert report.samples == 3 * 40
    assert report.last_round_samples == 40
    assert list(report.labels.counts) == [30, 90]
    assert [r.round for r in report.rounds] == [11, 12, 13]
    assert report.client_edge.up_bytes == 6 * 100
    assert report.client_edge.messages == 12
    assert not report.faults


def test_other_edges_clients_are_not_called() -> None:
    edge, grid = window(add_one)
    edge.run()
    assert [p.client for p in grid.plans] == ["c1", "c2"]


def test_straggler_is_dropped_and_counted_and_goes_back() -> None:
    def answer(plan: pb.RoundPlan, weights: Weights, message: Message) -> Message | None:
        return None if (plan.client, plan.round) == ("c2", 12) else add_one(plan, weights, message)

    edge, grid = window(answer, rounds=3)
    report = edge.run()
    assert [(f.node, f.kind, f.round) for f in report.faults] == [("c2", "straggler", 12)]
    np.testing.assert_allclose(edge.weights.views()["w"], 1.75 + 1 + 1.75, rtol=1e-6)
    # c2 trained round 12 in vain: in round 13 it starts from its state of round 11, c1 from that of 12.
    starts = {(p.client, p.round): (p.start.window, p.start.round) for p in grid.plans}
    assert starts == {
        ("c1", 11): (2, 10),
        ("c2", 11): (2, 10),
        ("c1", 12): (3, 11),
        ("c2", 12): (3, 11),
        ("c1", 13): (3, 12),
        ("c2", 13): (3, 11),
    }


GOOD = {"w": np.ones((2, 2), np.float32), "b": np.ones(2, np.float32)}


@pytest.mark.parametrize(
    ("arrays", "changes", "fault"),
    [
        (
            GOOD | {"w": np.full((2, 2), np.nan, np.float32)},
            {},
            "tensor 'w' holds a value that is not finite",
        ),
        (GOOD | {"w": np.ones((1, 1), np.float32)}, {"with_layout": True}, r"'w' is float32\[1, 1\]"),
        (GOOD | {"w": np.ones((1, 1), np.float32)}, {}, r"shape \(3,\), expected \(6,\)"),
        ({"w": np.ones((2, 2), np.float32)}, {"with_layout": True}, "tensor 'b' is missing"),
        (GOOD | {"b": np.ones(2)}, {}, "a tensor is missing or too many"),
        (GOOD, {"run": "other"}, "a reply to run 'other'"),
        (GOOD, {"window": 2}, "window 2"),
        (GOOD, {"round": 10}, "a reply to round 10, this is round 11"),
        (GOOD, {"client": "c1"}, "an update in the name of 'c1'"),
        (GOOD, {"samples": 31}, "31 samples, its hello had 30"),
        (GOOD, {"samples": 0}, "0 samples"),
        (GOOD, {"loss": float("nan")}, "a loss that is not a number"),
        (GOOD, {"schema": 99}, "of schema 99"),
    ],
)
def test_bad_update_is_refused_by_name_and_the_round_goes_on(
    arrays: dict[str, np.ndarray], changes: dict[str, Any], fault: str
) -> None:
    def answer(plan: pb.RoundPlan, weights: Weights, message: Message) -> Message:
        return (
            reply_to(plan, message, arrays, **changes)
            if plan.client == "c2"
            else add_one(plan, weights, message)
        )

    edge, _ = window(answer)
    report = edge.run()
    [found] = report.faults
    assert (found.node, found.kind, found.window, found.round) == ("c2", "refused", 3, 11)
    with pytest.raises(AssertionError, match=fault):
        raise AssertionError(found.detail)
    np.testing.assert_allclose(edge.weights.views()["w"], 1.0)
    assert report.samples == 10


def test_clients_error_is_reported() -> None:
    def answer(plan: pb.RoundPlan, weights: Weights, message: Message) -> Message:
        if plan.client == "c1":
            return Message(Error(3, "RuntimeError: out of memory"), reply_to=message)
        return add_one(plan, weights, message)

    edge, _ = window(answer)
    [found] = edge.run().faults
    assert (found.node, found.kind) == ("c1", "error")
    assert "out of memory" in found.detail


def test_garbage_content() -> None:
    def answer(plan: pb.RoundPlan, weights: Weights, message: Message) -> Message:
        return (
            Message(RecordDict(), reply_to=message)
            if plan.client == "c1"
            else add_one(plan, weights, message)
        )

    edge, _ = window(answer)
    [found] = edge.run().faults
    assert (found.node, found.kind) == ("c1", "refused")
    assert "no ClientReport" in found.detail


def test_below_quorum_the_model_stays() -> None:
    def answer(plan: pb.RoundPlan, weights: Weights, message: Message) -> Message | None:
        return None if plan.client == "c2" else add_one(plan, weights, message)

    edge, _ = window(answer, quorum=2)
    report = edge.run()
    assert {f.kind for f in report.faults} == {"straggler", "quorum"}
    np.testing.assert_array_equal(edge.weights.views()["w"], 0)
    assert report.samples == 0
    assert not report.labels.counts


def test_settings_that_do_not_fit_are_the_clouds_fault() -> None:
    plan = pb.WindowPlan(schema=control.SCHEMA, run="r", window=1)
    plan.settings.update({"method": "fedmagic"})
    empty = Weights.pack({})
    with pytest.raises(WireError, match="'cloud' refused: settings this edge does not take"):
        EdgeWindow("e", plan, empty, cast(Any, FakeGrid(add_one)), cast(Roster, FakeRoster()), EdgeProgress())


def test_closed_run_ends_the_window() -> None:
    edge, grid = window(add_one, rounds=2)
    grid.closed = True
    with pytest.raises(EspalierError, match="ended in the middle"):
        edge.run()
