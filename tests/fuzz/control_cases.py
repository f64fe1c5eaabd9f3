"""Decoders of control messages, signatures, keys and Flower's own objects."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Any, cast

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from google.protobuf.message import Message as Proto

from espalier.errors import WireError
from espalier.flower.arrays import array_from_numpy, numpy_view, payload_bytes
from espalier.flower.payloads import PayloadError, content_id, pack, unpack
from espalier.flower.run_info import parse_run_record
from espalier.names import check_sender, is_name
from espalier.security.keys import canonical
from espalier.wire import control
from espalier.wire.hello import check_client_hello
from espalier.wire.payload import Weights
from espalier.wire.signature import check, sign, statement_of, verify
from espalier_edge.relay import relay
from espalier_proto import espalier_pb2 as pb
from espalier_proto import monitor_pb2 as mpb
from tests.fuzz.campaign import Case
from tests.fuzz.examples import HELLO, KEY, MODEL, PUBLIC, STATUS, wire
from tests.fuzz.mutate import mutate_bytes, mutate_proto
from tests.fuzz.mutate_arrays import mutate_content
from tests.fuzz.recorded import finite


def proto_case(name: str, example: Proto, sound: Callable[[Any], str] = lambda m: "") -> Case:
    kind = type(example)

    def mutant(rng: Random) -> bytes:
        return mutate_bytes(wire(example), rng) if rng.random() < 0.6 else wire(mutate_proto(example, rng))

    def unsound(data: bytes, made: Any) -> str:
        if made.schema != control.SCHEMA or type(made) is not kind:
            return "a message of another schema"
        return sound(made)

    def feed(data: bytes) -> Any:
        return control.decode(kind, data, "sender")

    return Case(name, mutant, feed, unsound, lambda: feed(wire(example)))


def hello_case() -> Case:
    def feed(data: bytes) -> pb.ClientHello:
        hello = control.decode(pb.ClientHello, data, "node 1")
        check_client_hello(hello, hello.name)
        check_sender(hello.name)
        return hello

    def unsound(data: bytes, hello: pb.ClientHello) -> str:
        counts = np.array(hello.histogram.counts)
        numbers = [*counts, hello.level, hello.facts.speed, hello.link_seconds, float(hello.samples)]
        if not is_name(hello.name) or len(counts) != len(hello.classes) or not len(counts):
            return "a hello that fits nothing"
        if not np.isfinite(numbers).all() or min(numbers) < 0 or hello.samples == 0:
            return "a hello with a number that makes no sense"
        return "" if np.isfinite(counts.sum()) and hello.samples < 2**53 else "counts that cannot be added up"

    def mutant(rng: Random) -> bytes:
        changed = cast(pb.ClientHello, mutate_proto(HELLO, rng))
        changed.histogram.noisy |= rng.random() < 0.3
        return wire(changed) if rng.random() < 0.8 else mutate_bytes(wire(HELLO), rng)

    return Case("edge: ClientHello", mutant, feed, unsound, lambda: feed(wire(HELLO)))


def signature_case() -> Case:
    plan = pb.RoundPlan(
        schema=control.SCHEMA, run="r", window=1, round=1, client="c0", edge="edge-1", nonce=b"n" * 16
    )
    report = pb.ClientReport(
        schema=control.SCHEMA, run="r", window=1, round=1, client="c0", samples=30, loss=0.5
    )
    record = Weights.pack(MODEL).to_record()
    payload = content_id(record)
    report.signed.CopyFrom(sign(statement_of(plan, report, payload), KEY))

    def mutant(rng: Random) -> tuple[pb.ClientReport, bytes]:
        which = rng.randrange(4)
        if which == 0:
            return report, mutate_bytes(payload, rng)
        changed = pb.ClientReport()
        changed.CopyFrom(report)
        if which == 1:
            changed.signed.signature = mutate_bytes(report.signed.signature, rng)
        elif which == 2:
            changed.signed.statement = mutate_bytes(report.signed.statement, rng)
        else:
            changed = cast(pb.ClientReport, mutate_proto(report, rng))
        return changed, payload

    def feed(changed: tuple[pb.ClientReport, bytes]) -> str:
        check(plan, *changed, PUBLIC)
        return "accepted"

    def unsound(changed: tuple[pb.ClientReport, bytes], made: str) -> str:
        same = pb.ClientReport()
        same.CopyFrom(changed[0])
        same.up_bytes = report.up_bytes  # the only thing that is not signed
        return "" if same == report and changed[1] == payload else "a signature of something else"

    return Case("edge: signature", mutant, feed, unsound, lambda: feed((report, payload)))


def verify_case() -> Case:
    signed = sign(pb.UpdateStatement(schema=control.SCHEMA, run="r", client="c0"), KEY)

    def mutant(rng: Random) -> tuple[pb.SignedStatement, bytes]:
        if rng.random() < 0.5:
            return signed, mutate_bytes(PUBLIC, rng)
        return cast(pb.SignedStatement, mutate_proto(signed, rng)), PUBLIC

    def feed(changed: tuple[pb.SignedStatement, bytes]) -> pb.UpdateStatement:
        return verify(*changed, "c0")

    def unsound(changed: Any, made: pb.UpdateStatement) -> str:
        # White space in a PEM file, or what stands after it, makes no other key.
        good = changed[0] == signed and canonical(changed[1], "c0") == canonical(PUBLIC, "c0")
        return "" if good else "a signature of something else"

    return Case("cloud: signed statement", mutant, feed, unsound, lambda: feed((signed, PUBLIC)))


def key_case() -> Case:
    def feed(changed: bytes) -> bytes:
        return canonical(changed, "c0")

    def unsound(changed: bytes, made: bytes) -> str:
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        key = load_pem_public_key(made)
        return "" if isinstance(key, ec.EllipticCurvePublicKey) else "no key of a node"

    return Case(
        "edge, cloud: public key", lambda rng: mutate_bytes(PUBLIC, rng), feed, unsound, lambda: feed(PUBLIC)
    )


def object_case() -> Case:
    content = RecordDict(
        {
            control.ARRAYS: Weights.pack(MODEL).to_record(),
            control.CONFIG: ConfigRecord({"a": 1, "b": b"x"}),
            control.METRICS: MetricRecord({"m": [1.0, 2.0]}),
        }
    )
    packed = pack(Message(content, 1, "train"))
    objects = {i: packed.content(i) for i in packed.objects}

    def mutant(rng: Random) -> dict[str, bytes]:
        changed = dict(objects)
        for _ in range(rng.choice((1, 1, 2))):
            name = rng.choice(sorted(changed))
            action = rng.randrange(8)
            if action == 0:
                del changed[name]
            elif action == 1:
                changed[name] = changed[rng.choice(sorted(changed))]
            elif action == 2:
                changed[name] = changed[name].replace(b"0", b"9", 1)
            elif action == 3:
                deep = b'{"dtype":' + b"[" * 100_000
                head, _, _ = changed[name].partition(b"\x00")
                changed[name] = head.rpartition(b" ")[0] + f" {len(deep)}".encode() + b"\x00" + deep
            else:
                changed[name] = mutate_bytes(changed[name], rng)
            if not changed:
                break
        return changed

    def feed(changed: dict[str, bytes]) -> Message:
        return unpack(packed.message_id, dict(changed))

    def unsound(changed: Any, made: Message) -> str:
        return (
            ""
            if payload_bytes(made.content) <= 20 * sum(map(len, changed.values()))
            else "more than was sent"
        )

    return Case("all: Flower objects", mutant, feed, unsound, lambda: feed(objects), (PayloadError,))


def run_record_case() -> Case:
    record = ConfigRecord({"run": "r", "config": json.dumps({"a": 1, "b": "x"}).encode()})

    def mutant(rng: Random) -> ConfigRecord:
        if rng.random() < 0.5:
            return cast(ConfigRecord, mutate_content(RecordDict({"r": record}), rng).get("r", ConfigRecord()))
        raw = cast(bytes, record["config"])
        data = rng.choice(
            (mutate_bytes(raw, rng), b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000, b"\xff\xfe")
        )
        return ConfigRecord({**record, "config": data})

    def unsound(changed: Any, made: tuple[str, dict[str, Any]]) -> str:
        good = made[0] and all(isinstance(v, bool | int | float | str) for v in made[1].values())
        return "" if good else "no configuration"

    return Case(
        "client: run record",
        mutant,
        parse_run_record,
        unsound,
        lambda: parse_run_record(record),
        (ValueError,),
    )


class Below:
    """An edge's grid: clients that answer a plain app's message."""

    def __init__(self, replies: list[RecordDict]) -> None:
        self._replies = dict(enumerate(replies, 1))

    def get_node_ids(self) -> list[int]:
        return list(self._replies)

    def exchange(self, messages: Iterable[Message], **_: Any) -> Iterator[Message]:
        for message in messages:
            yield Message(self._replies[message.metadata.dst_node_id], reply_to=message)


def passed_on(replies: list[RecordDict]) -> tuple[RecordDict, list[str]]:
    """Let an edge pass a plain app's message on and add the replies up."""
    return relay(Message(RecordDict(), 1, "train"), cast(Any, Below(replies)), ConfigRecord({}), 60.0)


def relay_case() -> Case:
    def reply(value: float) -> RecordDict:
        arrays = ArrayRecord({"w": array_from_numpy(np.full((2, 2), value, np.float32))})
        numbers = MetricRecord({"num-examples": 10, "loss": value, "per": [value, 1.0]})
        return RecordDict({"arrays": arrays, "metrics": numbers, "told": ConfigRecord({"a": 1})})

    good = [reply(1.0), reply(3.0)]
    wanted, _ = passed_on(good)

    def feed(changed: RecordDict) -> RecordDict:
        content, faults = passed_on([good[0], changed, good[1]])
        if faults:
            same = np.array_equal(
                numpy_view(content.array_records["arrays"]["w"]),
                numpy_view(wanted.array_records["arrays"]["w"]),
            )
            if not same or content["metrics"] != wanted["metrics"]:
                raise AssertionError(f"refused, and yet in the sum ({faults})")
            raise WireError("node 2", faults[0])
        return content

    def unsound(changed: RecordDict, made: RecordDict) -> str:
        arrays = {n: numpy_view(a) for n, a in made.array_records["arrays"].items()}
        numbers = [v for v in made.metric_records["metrics"].values() if not isinstance(v, list)]
        return "" if finite(arrays) and np.isfinite(numbers).all() else "a sum that is not finite"

    return Case(
        "edge: plain app's reply",
        lambda rng: mutate_content(good[0], rng),
        feed,
        unsound,
        lambda: feed(good[0]),
    )


def equal_replies_case() -> Case:
    """Return the case of replies that cannot be added up, and pass only where they are equal."""
    good = RecordDict({"told": ConfigRecord({"version": "1.0"}), "numbers": MetricRecord({"a": 1.0})})

    def feed(changed: RecordDict) -> RecordDict:
        content, faults = passed_on([good, changed])
        if faults:
            if content != good:
                raise AssertionError(f"refused, and yet passed on ({faults})")
            raise WireError("node 2", faults[0])
        return content

    def unsound(changed: RecordDict, made: RecordDict) -> str:
        return "" if made == good == changed else "a reply that is none of the others'"

    return Case(
        "edge: plain app's answer",
        lambda rng: mutate_content(good, rng),
        feed,
        unsound,
        lambda: feed(good),
        share=0.3,
    )


def monitor_case() -> Case:
    from rich.console import Console

    from espalier_server.commands.status_client import as_dict
    from espalier_server.commands.status_text import exit_status, render, troubles

    def mutant(rng: Random) -> mpb.TreeStatus:
        return cast(mpb.TreeStatus, mutate_proto(STATUS, rng))

    def feed(status: mpb.TreeStatus) -> str:
        with open("/dev/null", "w") as nowhere:
            console = Console(file=nowhere, width=100)
            console.print(render(status))
        troubles(status), exit_status(status)
        return json.dumps(as_dict(status))

    def unsound(status: Any, made: str) -> str:
        return ""

    return Case("viewer: TreeStatus", mutant, feed, unsound, lambda: feed(STATUS), share=0.3)
