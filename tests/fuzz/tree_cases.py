"""An edge and a cloud, and what a hostile cloud, client or edge sends them, in the exchanges of recorded runs."""

from __future__ import annotations

import json
from random import Random
from typing import Any, cast

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from espalier.errors import WireError
from espalier.wire import control
from espalier.wire.sections import Payload, Sections
from espalier_edge.rounds import EdgeProgress, EdgeWindow
from espalier_proto import espalier_pb2 as pb
from tests.fuzz.campaign import Case
from tests.fuzz.examples import wire
from tests.fuzz.mutate import mutate_bytes, mutate_proto
from tests.fuzz.mutate_arrays import mutate_content
from tests.fuzz.recorded import Answers, Fixed, Recording, Replay, all_finite, finite


def window_case(recording: Recording) -> Case:
    scene = recording.edges[0]
    content = control.plan_content(scene.plan, scene.payload)

    def feed(changed: RecordDict) -> tuple[pb.WindowPlan, pb.EdgeReport, Payload]:
        message = Message(changed, 1, control.TRAIN)
        plan = control.decode(pb.WindowPlan, control.plan_bytes(message), "cloud")
        payload = control.read_payload(message, control.plan_sections(plan, "cloud"), "cloud")
        grid, roster = cast(Any, Replay({})), cast(Any, Fixed(scene.known))
        window = EdgeWindow(scene.edge, plan, payload, grid, roster, EdgeProgress())
        return plan, *(window.inquire() if plan.inquiry else window.run())

    def unsound(changed: RecordDict, made: tuple[pb.WindowPlan, pb.EdgeReport, Payload]) -> str:
        return "" if not made[1].samples and all_finite(made[2].views()) else "samples of nobody"

    def mutant(rng: Random) -> RecordDict:
        return mutate_content(content, rng, [(control.CONFIG, control.PLAN, pb.WindowPlan)])

    return Case("edge: WindowPlan", mutant, feed, unsound, lambda: feed(content), share=0.5)


REPLY = [(control.REPORT, control.PLAN, pb.ClientReport)]


def reply_case(name: str, recording: Recording, *, signed: bool) -> Case:
    """Return the case of an edge with honest clients and one whose reply is changed."""
    scene = recording.edges[-2] if len(recording.edges) > 1 else recording.edges[0]
    if not signed:
        scene = scene.unsigned()
    victim = scene.clients[0]
    [original] = [c for k, c in scene.replies.items() if k[1] == victim and not k[2]]
    whole, without = meaning(*scene.play(victim, original)), meaning(*scene.play(victim))

    def mutant(rng: Random) -> RecordDict:
        return mutate_content(original, rng, REPLY)

    def feed(changed: RecordDict) -> tuple[pb.EdgeReport, Payload]:
        report, payload = scene.play(victim, changed)
        if victim in {c.client for r in report.rounds for c in r.clients}:
            return report, payload
        [fault] = [f for f in report.faults if f.node == victim]
        if meaning(report, payload) != without:
            raise AssertionError("refused, and yet in the sums")
        raise WireError(victim, fault.detail)

    def unsound(changed: RecordDict, made: tuple[pb.EdgeReport, Payload]) -> str:
        report, payload = made
        if signed:
            return "" if meaning(report, payload) == whole else "a change of what was signed was let in"
        others = {c.client for r in report.rounds for c in r.clients}
        numbers = [c.samples for r in report.rounds for c in r.clients] + list(report.metrics.values())
        if not set(scene.clients) <= others or not np.isfinite(numbers).all():
            return "the others' updates are lost, or a number is not finite"
        if not all_finite(payload.views()):
            return "the edge's sums are not finite"
        wire(report)
        return ""

    kind = "signed" if signed else "unsigned"
    return Case(
        f"edge: ClientReport of {name}, {kind}", mutant, feed, unsound, lambda: feed(original), share=0.6
    )


def meaning(report: pb.EdgeReport, payload: Payload) -> tuple[Any, ...]:
    """Return what an edge's report comes to, bit for bit."""
    arrays = exact(payload.views())
    who = [(r.round, sorted((c.client, c.samples, c.loss) for c in r.clients)) for r in report.rounds]
    return arrays, who, report.samples, dict(report.metrics)


def exact(sections: Sections) -> dict[Any, Any]:
    """Return the sections of a payload, bit for bit."""
    return {
        (s, n): (a.dtype.str, a.shape, a.tobytes()) for s, own in sections.items() for n, a in own.items()
    }


def report_case(name: str, recording: Recording, *, signed: bool = True) -> Case:
    """Return the case of a cloud with an honest edge and one whose report is changed."""
    scene = recording.clouds[-1] if signed else recording.clouds[-1].unsigned()
    node = min(scene.replies)
    original = scene.replies[node]
    _, without, _ = scene.play(node)
    reference = exact(without.payload.views())

    def feed(changed: RecordDict) -> Any:
        outcome, state, samples = scene.play(node, changed)
        for fault in outcome.faults:
            json.dumps([fault.node, fault.detail])
        if f"edge-{node}" in outcome.reports:
            return outcome, state, samples
        if exact(state.payload.views()) != reference:
            raise AssertionError("refused, and yet in the model")
        [fault] = [f for f in outcome.faults if f.node == f"edge-{node}"]
        raise WireError(fault.node, fault.detail)

    def unsound(changed: RecordDict, made: Any) -> str:
        _, state, _ = made
        return "" if all_finite(state.payload.views()) else "a model that is not finite"

    def mutant(rng: Random) -> RecordDict:
        return mutate_content(original, rng, [(control.REPORT, control.PLAN, pb.EdgeReport)])

    kind = "signed" if signed else "unsigned"
    return Case(
        f"cloud: EdgeReport of {name}, {kind}", mutant, feed, unsound, lambda: feed(original), share=0.6
    )


def answers_case(name: str, recording: Recording) -> Case:
    """Return the case of a cloud that asks clients, and of one edge whose answer is changed."""
    scene = recording.inquiries[-1]
    node = min(scene.replies)
    original = scene.replies[node]
    _, others = scene.play(node)
    whole = set(scene.play()[1])

    def feed(changed: RecordDict) -> dict[str, Any]:
        outcome, found = scene.play(node, changed)
        if fault := next((f for f in outcome.faults if f.node == f"edge-{node}"), None):
            if set(found) != set(others):
                raise AssertionError("refused, and yet among the answers")
            raise WireError(fault.node, fault.detail)
        return found

    def unsound(changed: RecordDict, made: dict[str, Any]) -> str:
        if not set(others) <= set(made) <= whole:
            return "answers of somebody else"
        numbers = [v for answer in made.values() for v in answer.metrics.values()]
        good = np.isfinite(numbers).all() and all(finite(answer.arrays) for answer in made.values())
        return "" if good else "an answer that is not finite"

    def mutant(rng: Random) -> RecordDict:
        return mutate_content(original, rng, [(control.REPORT, control.PLAN, pb.EdgeReport)])

    return Case(f"cloud: answers of {name}", mutant, feed, unsound, lambda: feed(original), share=0.6)


def edge_hello_case(recording: Recording) -> Case:
    scene = recording.clouds[-1]
    tree = scene.tree
    node, edge = next((n, e) for n, e in tree._edges.items())
    client = next(iter(tree._clients.values()))
    hello = pb.EdgeHello()
    hello.CopyFrom(edge)
    hello.clients.append(client)

    def mutant(rng: Random) -> bytes:
        return wire(mutate_proto(hello, rng)) if rng.random() < 0.7 else mutate_bytes(wire(hello), rng)

    def feed(data: bytes) -> Any:
        from tests.fuzz.recorded import copied

        twin = copied(tree)
        message = Message(
            RecordDict({control.REPORT: ConfigRecord({control.PLAN: data})}), node, control.HELLO
        )
        twin.grid = cast(Any, Answers({node: message.content}, tree.grid))
        before = len(twin.faults)
        twin.refresh(all_edges=True)
        twin.members(), twin.roster()
        if len(twin.faults) > before and twin.faults[-1].tier == "cloud":
            raise WireError(twin.faults[-1].node, twin.faults[-1].detail)
        return twin

    def unsound(data: bytes, twin: Any) -> str:
        return (
            "" if all(np.isfinite(m.labels).all() for m in twin.members()) else "labels that are not finite"
        )

    return Case("cloud: EdgeHello", mutant, feed, unsound, lambda: feed(wire(hello)), share=0.5)


#: Runs whose messages are mutated: plain sums, codes on every link, tables, forwarded tensors, slices, own networks.
RUNS: dict[str, dict[str, Any]] = {
    "fedavg, qsgd": {
        "method": "fedavg",
        "codec": "qsgd",
        "downlink": "bf16",
        "edge-codec": "qsgd",
        "selection": "divfl",
        "divfl-gradients": "ideal",
    },
    "q-fedavg": {"method": "qfedavg", "fairness-q": 2.0},
    "fd": {"method": "fd"},
    "feddyn": {"method": "feddyn", "codec": "bf16"},
    "heterofl": {"method": "heterofl", "levels": "1,0.5"},
    "cfl": {"method": "cfl"},
    "codistillation": {"method": "codistillation"},
}
