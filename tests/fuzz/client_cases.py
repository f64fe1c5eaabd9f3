"""A client, and what a hostile server sends it."""

from __future__ import annotations

from random import Random
from typing import Any, cast

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from espalier.methods.run_config import RunConfig
from espalier.models.architecture import build
from espalier.models.initial import initial_model
from espalier.wire import control
from espalier_client.app import app as client_app
from espalier_client.inquiry import answer
from espalier_client.training import read_task
from espalier_proto import espalier_pb2 as pb
from tests.fuzz.campaign import Case
from tests.fuzz.mutate import mutate_proto
from tests.fuzz.mutate_arrays import mutate_content
from tests.fuzz.recorded import finite
from tests.support.calls import call, device


def plan_case(name: str, **settings: Any) -> Case:
    made = call(device(), **settings)
    plan = made.plan()
    content = control.plan_content(plan, made.sent)
    protos = [(control.CONFIG, control.PLAN, pb.RoundPlan)]

    def feed(changed: RecordDict) -> Any:
        message = Message(changed, 1, "train")
        read = control.decode(pb.RoundPlan, control.plan_bytes(message), "edge")
        return read_task(made.device, read, message)

    def unsound(changed: RecordDict, task: Any) -> str:
        numbers = {n: t.detach().numpy() for n, t in task.model.state_dict().items()}
        return "" if finite(numbers) and task.plan.client == "c" else "a network that is not finite"

    return Case(
        f"client: RoundPlan ({name})",
        lambda rng: mutate_content(content, rng, protos),
        feed,
        unsound,
        lambda: feed(content),
        share=0.5,
    )


def inquiry_case() -> Case:
    made = call(device(), method="fedavg", model="mlp", seed=3)
    plan = made.plan(inquiry="loss")
    content = control.plan_content(plan, made.sent)

    def mutant(rng: Random) -> RecordDict:
        return mutate_content(content, rng, [(control.CONFIG, control.PLAN, pb.RoundPlan)])

    def feed(changed: RecordDict) -> RecordDict:
        message = Message(changed, 1, control.INQUIRY)
        read = control.decode(pb.RoundPlan, control.plan_bytes(message), "edge")
        return answer(made.device, read, message)

    def unsound(changed: RecordDict, made_: RecordDict) -> str:
        return "" if np.isfinite(cast(float, made_.metric_records[control.METRICS]["loss"])) else "no loss"

    return Case("client: inquiry", mutant, feed, unsound, lambda: feed(content), share=0.5)


def side_case() -> Case:
    from flwr.app import Context

    context = Context(1, 1, {"name": "c", "data": "digits:0/32", "device": "cpu"}, RecordDict(), {})
    content = RecordDict(
        {control.CONFIG: ConfigRecord({"run": "r", "histogram-epsilon": 0.0, "fault": "why"})}
    )

    def mutant(rng: Random) -> tuple[str, RecordDict]:
        return rng.choice((control.HELLO, control.REFUSAL)), mutate_content(content, rng)

    def feed(changed: tuple[str, RecordDict]) -> Message:
        kind, body = changed
        return client_app(Message(body, 1, kind), context)

    def unsound(changed: Any, made: Message) -> str:
        if changed[0] != control.HELLO:
            return ""
        hello = control.read_control(pb.ClientHello, made, "c")
        return "" if np.isfinite(list(hello.histogram.counts)).all() else "a hello that is not finite"

    return Case(
        "client: hello and refusal", mutant, feed, unsound, lambda: feed((control.HELLO, content)), share=0.5
    )


def architecture_case(name: str, shape: tuple[int, int, int], **settings: Any) -> Case:
    from espalier.models.architecture import describe

    spec = describe(initial_model(RunConfig.from_flat(settings), shape, 10))

    def unsound(changed: pb.ArchitectureSpec, model: Any) -> str:
        said = {t.name: tuple(t.shape) for t in changed.tensors}
        found = {n: tuple(t.shape) for n, t in model.state_dict().items()}
        return "" if said == found else "another network than was described"

    return Case(
        f"client: ArchitectureSpec ({name})",
        lambda rng: mutate_proto(spec, rng),
        build,
        unsound,
        lambda: build(spec),
        (ValueError,),
        share=0.7,
    )
