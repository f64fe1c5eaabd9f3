"""A window at an edge over a fake grid: aggregates, stragglers, interruptions, refusals, versions, views."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from espalier.errors import EspalierError, WireError
from espalier.methods.aggregate import NOMINAL, SUMS, Aggregate, forwarded_in
from espalier.methods.run_config import RunConfig
from espalier.methods.scaffold import CONTROL
from espalier.wire import control
from espalier.wire.payload import Layout
from espalier.wire.sections import (
    GRADIENT,
    MODEL,
    Payload,
    SectionId,
    Sections,
    layouts_from_proto,
    layouts_to_proto,
)
from espalier.wire.uplink import CODE
from espalier_edge.pace import Pace
from espalier_edge.roster import Member, Roster
from espalier_edge.rounds import EdgeProgress, EdgeWindow
from espalier_proto import espalier_pb2 as pb

TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

SAMPLES = {"c1": 10, "c2": 30}
NODES = {"c1": 11, "c2": 22}
Answer = Callable[[pb.RoundPlan, Payload, Message], Message | None]


class FakeRoster:
    """Two clients that are always there."""

    def clients(self) -> dict[str, Member]:
        found = {}
        for name, node in NODES.items():
            labels = [SAMPLES[name], 0] if name == "c1" else [0, SAMPLES[name]]
            hello = pb.ClientHello(
                name=name,
                samples=SAMPLES[name],
                histogram=pb.LabelHistogram(counts=labels),
                classes=["a", "b"],
            )
            found[name] = Member(node, hello)
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
            payload = control.read_payload(message, control.plan_sections(plan, "edge"), "edge")
            reply = self.answer(plan, payload, message)
            if reply is not None:
                yield reply


def reply_to(plan: pb.RoundPlan, message: Message, arrays: dict[str, np.ndarray], **changes: Any) -> Message:
    """Return a reply with the model alone."""
    return reply_of(plan, message, {MODEL: arrays}, **changes)


def reply_of(plan: pb.RoundPlan, message: Message, sections: Sections, **changes: Any) -> Message:
    payload = Payload.pack(sections)
    report = pb.ClientReport(
        schema=control.SCHEMA,
        run=plan.run,
        window=plan.window,
        round=plan.round,
        client=plan.client,
        samples=SAMPLES[plan.client],
        steps=1,
        loss=0.5,
        up_bytes=10**9,
    )
    report.metrics.update(changes.pop("metrics", {}))
    if changes.pop("with_layout", False):
        report.sections.extend(layouts_to_proto(payload.layouts))
    for key, value in changes.items():
        setattr(report, key, value)
    return Message(control.report_content(report, payload, report.samples, report.loss), reply_to=message)


def add_one(plan: pb.RoundPlan, payload: Payload, message: Message) -> Message:
    """Train as c1, which adds 1 to every weight, or as c2, which adds 2."""
    step = np.float32(1 if plan.client == "c1" else 2)
    return reply_to(plan, message, {n: v + step for n, v in payload[MODEL].views().items()})


NETWORK = {"w": np.zeros((2, 2), np.float32), "b": np.zeros(2, np.float32)}
LAYOUT = Layout.of(NETWORK)
#: These replies are not signed; those of wire/test_signature.py are.
SETTINGS = {"method": "fedavg", "model": "cnn", "require-signatures": False}


def window(
    answer: Answer,
    *,
    rounds: int = 1,
    quorum: int = 1,
    sections: Sections | None = None,
    **settings: Any,
) -> tuple[EdgeWindow, FakeGrid]:
    plan, payload = window_plan(rounds, quorum, sections or {}, **settings)
    return edge_window(plan, payload, answer)


def edge_window(plan: pb.WindowPlan, payload: Payload, answer: Answer) -> tuple[EdgeWindow, FakeGrid]:
    grid = FakeGrid(answer)
    roster = cast(Roster, FakeRoster())
    return EdgeWindow("edge-1", plan, payload, cast(Any, grid), roster, EdgeProgress()), grid


def window_plan(
    rounds: int, quorum: int, sections: Sections, **settings: Any
) -> tuple[pb.WindowPlan, Payload]:
    payload = Payload.pack({MODEL: NETWORK, **sections})
    plan = pb.WindowPlan(
        schema=control.SCHEMA,
        run="r",
        window=3,
        settings=RunConfig.from_flat({**SETTINGS, **settings}).to_struct(),
        architecture=pb.ArchitectureSpec(tensors=LAYOUT.to_proto().tensors),
        sections=layouts_to_proto(payload.layouts),
        round_deadline=5,
        quorum=quorum,
        checkpoint_window=2,
    )
    for i in range(rounds):
        schedule = plan.rounds.add(round=11 + i)
        for client in NODES:
            schedule.participants.add(client=client, edge="edge-1", start=pb.Version(window=2, round=10))
        schedule.participants.add(client="elsewhere", edge="edge-2")
    return plan, payload


def means(report: pb.EdgeReport, payload: Payload, layout: Layout = LAYOUT) -> dict[str, np.ndarray]:
    """Read a window's aggregate as the cloud does; a coordinate that no client held is -9."""
    assert layouts_from_proto(report.sections, "edge-1") == payload.layouts
    aggregate = Aggregate({MODEL: layout})
    aggregate.absorb(payload, report.metrics)
    previous = {t.name: np.full(t.shape, -9, np.float32) for t in layout.tensors}
    return aggregate.means({MODEL: previous}).get(MODEL, {})


def test_rounds_add_up() -> None:
    edge, _ = window(add_one, rounds=3)
    report, payload = edge.run()
    # A round moves the model by (10·1 + 30·2) / 40 = 1.75.
    np.testing.assert_allclose(means(report, payload)["w"], 3 * 1.75, rtol=1e-6)
    assert report.metrics[NOMINAL] == 3 * 40
    assert report.samples == 3 * 40
    assert report.last_round_samples == 40
    assert list(report.labels.counts) == [30, 90]
    assert [r.round for r in report.rounds] == [11, 12, 13]
    # Measured here: what clients say of it counts for nothing. 6 floats each, their header, report and metrics.
    assert 6 * 24 < report.client_edge.up_bytes < 6 * 1000
    assert all(0 < c.up_bytes < 1000 for r in report.rounds for c in r.clients)
    assert report.client_edge.messages == 12
    assert not report.faults


def test_other_edges_clients_are_not_called() -> None:
    edge, grid = window(add_one)
    edge.run()
    assert [p.client for p in grid.plans] == ["c1", "c2"]


def test_straggler_is_dropped_and_counted_and_goes_back() -> None:
    def answer(plan: pb.RoundPlan, payload: Payload, message: Message) -> Message | None:
        return None if (plan.client, plan.round) == ("c2", 12) else add_one(plan, payload, message)

    edge, grid = window(answer, rounds=3)
    report, payload = edge.run()
    assert [(f.node, f.kind, f.round) for f in report.faults] == [("c2", "straggler", 12)]
    np.testing.assert_allclose(means(report, payload)["w"], 1.75 + 1 + 1.75, rtol=1e-6)
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
        (GOOD, {"loss": float("nan")}, "a loss or another metric that is not finite"),
        (GOOD, {"metrics": {"sparse-penalty": float("inf")}}, "another metric that is not finite"),
        (GOOD | {"w/x": np.ones(2, np.float32)}, {"with_layout": True}, "tensor 'w/x' was not asked for"),
        (GOOD, {"schema": 99}, "of schema 99"),
    ],
)
def test_bad_update_is_refused_by_name_and_the_round_goes_on(
    arrays: dict[str, np.ndarray], changes: dict[str, Any], fault: str
) -> None:
    def answer(plan: pb.RoundPlan, payload: Payload, message: Message) -> Message:
        return (
            reply_to(plan, message, arrays, **changes)
            if plan.client == "c2"
            else add_one(plan, payload, message)
        )

    edge, _ = window(answer)
    report, payload = edge.run()
    [found] = report.faults
    assert (found.node, found.kind, found.window, found.round) == ("c2", "refused", 3, 11)
    assert re.search(fault, found.detail)
    np.testing.assert_allclose(means(report, payload)["w"], 1.0)
    assert report.samples == 10


def test_clients_error_is_reported() -> None:
    def answer(plan: pb.RoundPlan, payload: Payload, message: Message) -> Message:
        if plan.client == "c1":
            return Message(Error(3, "RuntimeError: out of memory"), reply_to=message)
        return add_one(plan, payload, message)

    edge, _ = window(answer)
    [found] = edge.run()[0].faults
    assert (found.node, found.kind) == ("c1", "error")
    assert "out of memory" in found.detail


def test_garbage_content() -> None:
    def answer(plan: pb.RoundPlan, payload: Payload, message: Message) -> Message:
        return (
            Message(RecordDict(), reply_to=message)
            if plan.client == "c1"
            else add_one(plan, payload, message)
        )

    edge, _ = window(answer)
    [found] = edge.run()[0].faults
    assert (found.node, found.kind) == ("c1", "refused")
    assert "no ClientReport" in found.detail


def test_below_quorum_the_model_stays() -> None:
    def answer(plan: pb.RoundPlan, payload: Payload, message: Message) -> Message | None:
        return None if plan.client == "c2" else add_one(plan, payload, message)

    edge, _ = window(answer, quorum=2)
    report, payload = edge.run()
    assert {f.kind for f in report.faults} == {"straggler", "quorum"}
    assert payload.layouts == {}
    assert report.metrics[NOMINAL] == 0
    np.testing.assert_array_equal(edge.server.tensors["w"], 0)
    assert report.samples == 0
    assert not report.labels.counts


def test_settings_that_do_not_fit_are_the_clouds_fault() -> None:
    plan = pb.WindowPlan(schema=control.SCHEMA, run="r", window=1)
    plan.settings.update({"method": "fedmagic"})
    empty = Payload({})
    with pytest.raises(WireError, match="'cloud' refused: settings that this edge rejects"):
        EdgeWindow("e", plan, empty, cast(Any, FakeGrid(add_one)), cast(Roster, FakeRoster()), EdgeProgress())


def test_closed_run_ends_the_window() -> None:
    edge, grid = window(add_one, rounds=2)
    grid.closed = True
    with pytest.raises(EspalierError, match="the run ended during window 3"):
        edge.run()


@pytest.mark.parametrize("inquiry", [False, True])
def test_the_end_of_the_run_during_a_round_makes_no_stragglers(
    inquiry: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(plan: pb.RoundPlan, payload: Payload, message: Message) -> Message | None:
        if plan.client == "c1":
            return train(plan, payload, message)
        grid.closed = True
        return None

    edge, grid = inquiry_window(answer, "loss") if inquiry else window(answer, quorum=2)
    train = ask_or_train if inquiry else add_one
    words = "the run ended during window 3; round 11 is abandoned without 1 of 2 replies (c2)"
    with pytest.raises(EspalierError, match=re.escape(words)):
        _ = edge.inquire() if inquiry else edge.run()
    assert list(edge.report.faults) == []
    assert "straggler" not in caplog.text


def test_a_window_that_the_cloud_abandoned_has_no_stragglers() -> None:
    pace = Pace()

    def answer(plan: pb.RoundPlan, payload: Payload, message: Message) -> Message | None:
        edge.progress.overtaken.set()
        return None

    plan, payload = window_plan(1, 1, {})
    grid, roster = cast(Any, FakeGrid(answer)), cast(Roster, FakeRoster())
    edge = EdgeWindow("edge-1", plan, payload, grid, roster, EdgeProgress(), pace)
    words = "the cloud continued without window 3; round 11 is abandoned without 2 of 2 replies (c1, c2)"
    with pytest.raises(EspalierError, match=re.escape(words)):
        edge.run()
    assert list(edge.report.faults) == []
    # The clients' pace does not count a deadline that had not passed.
    assert pace.deadline({"c1": 1.0}, {}, 600.0) == Pace().deadline({"c1": 1.0}, {}, 600.0)


def test_clients_without_a_reply_at_the_deadline_are_stragglers() -> None:
    pace = Pace()
    plan, payload = window_plan(1, 0, {})
    grid, roster = cast(Any, FakeGrid(lambda *_: None)), cast(Roster, FakeRoster())
    report, _ = EdgeWindow("edge-1", plan, payload, grid, roster, EdgeProgress(), pace).run()
    details = [(f.node, f.detail) for f in report.faults if f.kind == "straggler"]
    assert details == [("c1", "no reply within 5 s"), ("c2", "no reply within 5 s")]


def test_an_update_the_method_refuses_is_its_clients_fault() -> None:
    """SCAFFOLD needs the sum of a client's step sizes; c2 keeps it to itself."""

    def answer(plan: pb.RoundPlan, payload: Payload, message: Message) -> Message:
        step = np.float32(1)
        arrays = {n: v + step for n, v in payload[MODEL].views().items()}
        return reply_to(plan, message, arrays, metrics={"lr-sum": 0.5} if plan.client == "c1" else {})

    control_variate = {n: np.zeros_like(v) for n, v in NETWORK.items()}
    edge, grid = window(answer, method="scaffold", sections={CONTROL: control_variate})
    report, payload = edge.run()
    [found] = report.faults
    assert (found.node, found.kind) == ("c2", "refused")
    assert "its sum of step sizes is 0.0" in found.detail
    assert [c.client for r in report.rounds for c in r.clients] == ["c1"]
    assert report.samples == 10
    np.testing.assert_allclose(payload.views()[MODEL]["w"], 1)
    # (w - y) / lr-sum = -1 / 0.5 of one client in a run of one.
    np.testing.assert_allclose(payload.views()[CONTROL._replace(record=SUMS)]["w"], -2)
    assert [s.name for s in grid.plans[0].sections] == ["model", "control"]
    assert all({t.name for t in s.layout.tensors} == set(NETWORK) for s in grid.plans[0].sections)


# --- parts of the model ------------------------------------------------------------------------------


#: A section beside the model, of which c2 is given a part.
OTHER = SectionId("other")


def narrow(**more: Any) -> pb.View:
    """Give the top left corner of w, and nothing else."""
    corner = Layout.of({"w": np.zeros((1, 1), np.float32)})
    return pb.View(architecture=pb.ArchitectureSpec(tensors=corner.to_proto().tensors), **more)


def sub_model_window(answer: Answer, view: pb.View, rounds: int = 1) -> tuple[EdgeWindow, FakeGrid]:
    """Let c1 train everything and c2 a part."""
    plan, payload = window_plan(rounds, 1, {})
    plan.views["narrow"].CopyFrom(view)
    for schedule in plan.rounds:
        for participant in schedule.participants:
            participant.view = "narrow" if participant.client == "c2" else ""
    return edge_window(plan, payload, answer)


def test_a_partial_model_is_averaged_over_its_holders() -> None:
    edge, grid = sub_model_window(add_one, narrow(), rounds=2)
    report, payload = edge.run()
    assert not report.faults
    first, second = (p for p in grid.plans if p.client == "c2")
    assert [(t.name, tuple(t.shape)) for t in first.architecture.tensors] == [("w", (1, 1))]
    assert not first.sections  # the architecture says it all
    assert list(first.returns) == ["w"]
    # In the corner both count, 1.75 a round; elsewhere c1 alone, who adds 1 a round.
    found = means(report, payload)
    np.testing.assert_allclose(found["w"], np.array([[3.5, 2], [2, 2]]))
    np.testing.assert_allclose(found["b"], 2)
    assert second.round == 12


@pytest.mark.parametrize(
    ("arrays", "changes", "fault"),
    [
        # One number that numpy would spread over all of w.
        (
            {"w": np.ones((), np.float32)},
            {"with_layout": True},
            r"'w' is float32\[\], expected float32\[1, 1\]",
        ),
        ({"w": np.ones((2, 2), np.float32)}, {"with_layout": True}, r"'w' is float32\[2, 2\], expected"),
        ({"w": np.ones((2, 2), np.float32)}, {}, r"shape \(4,\), expected \(1,\)"),
        ({"b": np.ones((1, 1), np.float32)}, {"with_layout": True}, "tensor 'w' is missing"),
        (GOOD, {"with_layout": True}, "tensor 'b' was not asked for"),
        ({"w": np.full((1, 1), np.inf, np.float32)}, {}, "tensor 'w' holds a value that is not finite"),
    ],
)
def test_an_invalid_partial_model_is_refused_by_name(
    arrays: dict[str, np.ndarray], changes: dict[str, Any], fault: str
) -> None:
    def answer(plan: pb.RoundPlan, payload: Payload, message: Message) -> Message:
        if plan.client == "c2":
            return reply_to(plan, message, arrays, **changes)
        return add_one(plan, payload, message)

    edge, _ = sub_model_window(answer, narrow())
    report, payload = edge.run()
    [found] = report.faults
    assert (found.node, found.kind, found.round) == ("c2", "refused", 11)
    assert re.search(fault, found.detail)
    np.testing.assert_array_equal(means(report, payload)["w"], 1)


def test_what_nobody_at_this_edge_holds_has_no_mean() -> None:
    def answer(plan: pb.RoundPlan, payload: Payload, message: Message) -> Message | None:
        return add_one(plan, payload, message) if plan.client == "c2" else None

    edge, _ = sub_model_window(answer, narrow(), rounds=2)
    found = means(*edge.run())
    np.testing.assert_array_equal(found["w"], [[4, -9], [-9, -9]])
    assert "b" not in found
    np.testing.assert_array_equal(edge.server.tensors["w"], [[2, 0], [0, 0]])


@pytest.mark.parametrize(
    "view",
    [
        narrow(sections=layouts_to_proto({MODEL: Layout.of({"w": np.zeros((3, 1), np.float32)})})),
        narrow(sections=layouts_to_proto({MODEL: Layout.of({"w": np.zeros(2, np.float32)})})),
        narrow(sections=layouts_to_proto({MODEL: Layout.of({"x": np.zeros(2, np.float32)})})),
        narrow(sections=layouts_to_proto({OTHER: Layout.of({"w": np.zeros((1, 1), np.float32)})})),
    ],
)
def test_a_view_that_no_slice_gives_is_the_clouds_fault(view: pb.View) -> None:
    edge, _ = sub_model_window(add_one, view)
    with pytest.raises(WireError, match=r"'cloud' refused: a view with tensor '[wx]'"):
        edge.run()


def test_a_view_the_plan_does_not_describe_is_the_clouds_fault() -> None:
    plan, payload = window_plan(1, 1, {})
    plan.rounds[0].participants[0].view = "missing"
    edge, _ = edge_window(plan, payload, add_one)
    with pytest.raises(WireError, match="'cloud' refused: a plan that does not describe its view 'missing'"):
        edge.run()


# --- coded updates ---------------------------------------------------------------------------------------


def test_an_update_that_is_not_coded_as_agreed_is_refused() -> None:
    def answer(plan: pb.RoundPlan, payload: Payload, message: Message) -> Message:
        if plan.client == "c2":
            return add_one(plan, payload, message)
        code = {n: np.full(v.shape, 0.5, np.float16) for n, v in payload[MODEL].views().items()}
        return reply_of(plan, message, {CODE: code})

    edge, _ = window(answer, codec="fp16")
    report, payload = edge.run()
    [found] = report.faults
    assert (found.node, found.kind) == ("c2", "refused")
    assert "no record 'code' in the message" in found.detail
    np.testing.assert_array_equal(means(report, payload)["w"], 0.5)


# --- clients that are asked --------------------------------------------------------------------------------

LOSSES = {"c1": 2.0, "c2": 5.0}


def ask_or_train(plan: pb.RoundPlan, payload: Payload, message: Message) -> Message:
    if plan.inquiry:
        return reply_to(plan, message, {}, loss=LOSSES[plan.client])
    return add_one(plan, payload, message)


def test_an_edge_keeps_its_share_of_the_largest_losses() -> None:
    plan, payload = window_plan(2, 1, {})
    plan.rounds[1].keep = 2  # of three candidates, two here: 2·2/3 = 1.33, so one is this edge's
    edge, grid = edge_window(plan, payload, ask_or_train)
    report, payload = edge.run()
    called = [(p.round, p.inquiry, p.client) for p in grid.plans]
    assert called == [
        (11, "", "c1"),
        (11, "", "c2"),
        (12, "loss", "c1"),
        (12, "loss", "c2"),
        (12, "", "c2"),
    ]
    # Asked about the edge's own model, with the states of its last round.
    asked = grid.plans[2]
    assert (asked.start.window, asked.start.round) == (3, 11)
    np.testing.assert_allclose(means(report, payload)["w"], 1.75 + 2)
    assert [[c.client for c in r.clients] for r in report.rounds] == [["c1", "c2"], ["c2"]]
    assert report.samples == 40 + 30
    assert not report.faults


def test_an_edge_can_rank_by_samples_and_loss() -> None:
    """c1 and c2 have 10 and 30 samples: c1's loss is larger, c2's samples times its loss are."""

    def answer(plan: pb.RoundPlan, payload: Payload, message: Message) -> Message:
        if plan.inquiry:
            return reply_to(plan, message, {}, loss={"c1": 2.0, "c2": 1.0}[plan.client])
        return add_one(plan, payload, message)

    for weight, kept in (("none", "c1"), ("samples", "c2")):
        plan, payload = window_plan(2, 1, {})
        plan.settings.update({"loss-weight": weight})
        plan.rounds[1].keep = 2
        edge, grid = edge_window(plan, payload, answer)
        edge.run()
        assert [p.client for p in grid.plans if p.round == 12 and not p.inquiry] == [kept]


def test_an_edge_keeps_whom_it_can_judge() -> None:
    """c2, whose answer is not sound, does not train; a round for nobody is none."""

    def answer(plan: pb.RoundPlan, payload: Payload, message: Message) -> Message | None:
        if plan.inquiry and plan.client == "c2":
            return reply_to(plan, message, {}, loss=float("nan"))
        if plan.inquiry and plan.round == 12:
            return None
        return ask_or_train(plan, payload, message)

    plan, payload = window_plan(2, 1, {})
    for schedule in plan.rounds:
        schedule.keep = 2
    edge, _ = edge_window(plan, payload, answer)
    report, payload = edge.run()
    np.testing.assert_allclose(means(report, payload)["w"], 1)
    assert [(f.node, f.kind, f.round) for f in report.faults] == [
        ("c2", "refused", 11),
        ("c2", "refused", 12),
        ("c1", "straggler", 12),
    ]
    assert [r.round for r in report.rounds] == [11]


def inquiry_window(answer: Answer, kind: str) -> tuple[EdgeWindow, FakeGrid]:
    plan, payload = window_plan(1, 1, {})
    plan.inquiry = kind
    return edge_window(plan, payload, answer)


def test_answers_are_passed_on_by_client() -> None:
    def answer(plan: pb.RoundPlan, payload: Payload, message: Message) -> Message:
        assert plan.inquiry == "gradient"
        gradient = {n: v + np.float32(LOSSES[plan.client]) for n, v in payload[MODEL].views().items()}
        return reply_of(plan, message, {GRADIENT: gradient}, loss=LOSSES[plan.client])

    edge, grid = inquiry_window(answer, "gradient")
    report, payload = edge.inquire()
    found = forwarded_in(payload)
    assert {c: {s: set(arrays) for s, arrays in own.items()} for c, own in found.items()} == {
        client: {GRADIENT: {"w", "b"}} for client in ("c1", "c2")
    }
    assert {c: own[GRADIENT]["b"].tolist() for c, own in found.items()} == {"c1": [2, 2], "c2": [5, 5]}
    assert {c.client: c.loss for r in report.rounds for c in r.clients} == LOSSES
    # Nobody trained.
    assert report.samples == 0
    assert report.metrics[NOMINAL] == 0
    np.testing.assert_array_equal(edge.server.tensors["w"], 0)
    assert [(p.start.window, p.start.round) for p in grid.plans] == [(2, 10), (2, 10)]


@pytest.mark.parametrize(
    ("kind", "arrays", "changes", "fault"),
    [
        ("gradient", {}, {}, "no record 'gradient' in the message"),
        ("gradient", {GRADIENT: {"w": np.ones((2, 2), np.float32)}}, {}, "has shape (4,), expected (6,)"),
        (
            "gradient",
            {GRADIENT: {"w": np.ones((2, 2), np.float32)}},
            {"with_layout": True},
            "'b' is missing",
        ),
        ("loss", {MODEL: {"w": np.ones((2, 2), np.float32)}}, {"with_layout": True}, "'w' was not asked for"),
        ("loss", {MODEL: {"w": np.ones((2, 2), np.float32)}}, {}, "the record 'arrays' was not asked for"),
        ("loss", {OTHER: {"w": np.ones((2, 2), np.float32)}}, {}, "the record 'other' was not asked for"),
        ("loss", {}, {"loss": float("inf")}, "a loss or another metric that is not finite"),
        ("loss", {}, {"round": 12}, "a reply to round 12, this is round 11"),
    ],
)
def test_an_unsound_answer_is_refused_by_name(
    kind: str, arrays: Sections, changes: dict[str, Any], fault: str
) -> None:
    def answer(plan: pb.RoundPlan, payload: Payload, message: Message) -> Message:
        if plan.client == "c2":
            return reply_of(plan, message, arrays, **changes)
        sound: Sections = {GRADIENT: payload[MODEL].views()} if kind == "gradient" else {}
        return reply_of(plan, message, sound)

    edge, _ = inquiry_window(answer, kind)
    report, payload = edge.inquire()
    [found] = report.faults
    assert (found.node, found.kind) == ("c2", "refused")
    assert fault in found.detail
    assert [c.client for r in report.rounds for c in r.clients] == ["c1"]
    assert set(forwarded_in(payload)) == ({"c1"} if kind == "gradient" else set())
