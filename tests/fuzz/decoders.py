"""The table of all decoders: where bytes or records that came over a link, or from another machine's file, are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any, cast

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from google.protobuf.message import Message as Proto

from client.app import app as client_app
from client.inquiry import answer
from client.training import read_task
from common.errors import WireError
from common.flower.arrays import array_from_numpy, numpy_view, payload_bytes
from common.flower.payloads import PayloadError, content_id, pack, unpack
from common.flower.run_info import parse_run_record
from common.keys import canonical
from common.models.architecture import build
from common.models.initial import initial_model
from common.names import check_name, is_name
from common.run.config import RunConfig
from common.wire import control
from common.wire.bitpack import pack as pack_bits
from common.wire.bitpack import unpack as unpack_bits
from common.wire.class_table import ClassTable, given_arrays, given_table, merge
from common.wire.codec import create_codec
from common.wire.hello import check_client_hello
from common.wire.pairs import Pairs
from common.wire.payload import STORED_AS, Layout, Weights
from common.wire.signature import check, sign, statement_of, verify
from common.wire.update import UpdateForm
from edge.relay import ReplySum
from edge.rounds import EdgeProgress, EdgeWindow
from proto import espalier_pb2 as pb
from proto import monitor_pb2 as mpb
from tests.fuzz.campaign import Case
from tests.fuzz.mutate import mutate_array, mutate_arrays, mutate_bytes, mutate_content, mutate_proto
from tests.fuzz.recorded import Fixed, Recording, Replay, finite
from tests.unit.calls import call, device

RNG = np.random.default_rng(3)
KEY = ec.generate_private_key(ec.SECP256R1())
PUBLIC = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
MODEL: dict[str, np.ndarray] = {
    "w": RNG.normal(size=(6, 5)).astype(np.float32),
    "b": RNG.normal(size=5).astype(np.float32),
    "n": np.array(7, np.int64),
    "h": RNG.normal(size=4).astype(np.float16),
}
LAYOUT = Layout.of(MODEL)

HELLO = pb.ClientHello(
    schema=1,
    name="c0",
    samples=30,
    histogram=pb.LabelHistogram(counts=[10, 20]),
    facts=pb.DeviceFacts(
        device="cpu", cores=2, memory_bytes=2**33, versions={"espalier": "0.1.0"}, speed=2.0
    ),
    image_shape=[1, 8, 8],
    classes=["a", "b"],
    data="digits",
    level=0.5,
    link_seconds=0.1,
    public_key=PUBLIC,
    homes=1,
)
EDGE_HELLO = pb.EdgeHello(
    schema=1,
    name="edge-1",
    clients=[HELLO],
    facts=HELLO.facts,
    faults=[pb.Fault(tier="edge", node="c1", kind="refused", detail="x")],
)
PROGRESS = pb.Progress(
    schema=1, run="r", edge="edge-1", window=1, round=2, training=["c0"], done=["c1"], loss=0.5
)
STATUS = mpb.TreeStatus(
    schema=1,
    time=1e9,
    tier="cloud",
    cloud=mpb.CloudStatus(name="c", started=1e9 - 50, superlink=True, waiting=["x"]),
    run=mpb.RunStatus(run="r", status="running", window=1, windows=3, round=2, rounds=6, losses=[1, 0.5]),
    edges=[mpb.EdgeStatus(name="edge-1", connected=True, loss=0.5, last_seen=1e9 - 1, training=["c0"])],
    clients=[mpb.ClientStatus(name="c0", edges=["edge-1"], samples=30, state="training", last_seen=1e9)],
)


def wire(value: Proto) -> bytes:
    return value.SerializeToString()


def content_of(record: ArrayRecord) -> Message:
    return Message(RecordDict({control.ARRAYS: record}), 1, "train")


def fits(layout: Layout, views: dict[str, np.ndarray]) -> str:
    """Say where views depart from a layout, or hold what is no number."""
    for t in layout.tensors:
        a = views.get(t.name)
        if a is None or tuple(a.shape) != t.shape or a.dtype != STORED_AS[t.dtype]:
            return f"tensor {t.name!r} is not what its layout says"
    return "" if finite(views) else "a number that is not finite"


# --- protobufs -------------------------------------------------------------------------------------


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
        check_name(hello.name)
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


def layout_case() -> Case:
    plan = pb.RoundPlan(schema=1, run="r", window=1, round=1, client="c", edge="e", layout=LAYOUT.to_proto())
    plan.architecture.tensors.extend(LAYOUT.to_proto().tensors)

    def feed(changed: pb.RoundPlan) -> Layout:
        layout = control.plan_layout(changed, "edge-1")
        if layout.nbytes <= 2**20:  # what comes of one whose bytes would really be sent
            Weights(layout, {d: np.zeros(n, STORED_AS[d]) for d, n in layout.lengths.items()}).views()
        return layout

    def unsound(changed: Any, layout: Layout) -> str:
        if any(len(t.shape) > 32 or t.dtype not in STORED_AS or not t.name for t in layout.tensors):
            return "a tensor that numpy cannot have"
        return "" if layout.nbytes < 2**36 else f"a layout of {layout.nbytes} bytes"

    return Case("all: Layout", lambda rng: mutate_proto(plan, rng), feed, unsound, lambda: feed(plan))


# --- arrays ----------------------------------------------------------------------------------------


def weights_case() -> Case:
    content = content_of(Weights.pack(MODEL).to_record()).content

    def feed(changed: RecordDict) -> Weights:
        return control.read_weights(Message(changed, 1, "train"), LAYOUT, "c0")

    def unsound(changed: RecordDict, made: Weights) -> str:
        return fits(LAYOUT, made.views())

    return Case(
        "all: Weights", lambda rng: mutate_content(content, rng), feed, unsound, lambda: feed(content)
    )


def view_case() -> Case:
    array = array_from_numpy(MODEL["w"])

    def unsound(changed: Any, made: np.ndarray) -> str:
        return "" if not made.dtype.hasobject and made.nbytes <= len(changed.data) else "objects, or too much"

    return Case(
        "all: numpy_view",
        lambda rng: mutate_array(array, rng),
        numpy_view,
        unsound,
        lambda: numpy_view(array),
        (ValueError,),
    )


def codec_case(**settings: Any) -> Case:
    codec = create_codec(RunConfig.from_flat(settings))
    update = {n: a for n, a in MODEL.items() if a.dtype == np.float32}
    like, rng_ = Layout.of(update), np.random.default_rng(1)
    form = UpdateForm(LAYOUT, LAYOUT, frozenset(), codec)
    payload, _ = form.encode(MODEL, {n: np.zeros_like(a) for n, a in MODEL.items()}, rng_)
    coded = codec.encode(update, rng_)
    record = RecordDict({control.ARRAYS: payload.to_record()})

    def mutant(rng: Random) -> Any:
        return mutate_content(record, rng) if rng.random() < 0.4 else mutate_arrays(dict(coded), rng)

    def feed(changed: Any) -> dict[str, np.ndarray]:
        if not isinstance(changed, RecordDict):
            return codec.decode(changed, like, "c0")
        got = control.read_weights(Message(changed, 1, "train"), form.wire, "c0")
        return form.decode(got, MODEL, "c0")

    def unsound(changed: Any, made: dict[str, np.ndarray]) -> str:
        return fits(LAYOUT if isinstance(changed, RecordDict) else like, made)

    return Case(f"edge: codec {codec.name}", mutant, feed, unsound, lambda: (feed(coded), feed(record)))


def bits_case() -> Case:
    packed = pack_bits(np.arange(13, dtype=np.uint16) * 70, 10)

    def mutant(rng: Random) -> tuple[np.ndarray, int, int]:
        data = np.frombuffer(mutate_bytes(packed.tobytes(), rng), np.uint8)
        return data, rng.choice((13, 12, 0, 10**6)), rng.choice((10, 9, 1, 24))

    def unsound(changed: Any, made: np.ndarray) -> str:
        return "" if len(made) == changed[1] and (made < 1 << changed[2]).all() else "other codes than wanted"

    def feed(changed: tuple[np.ndarray, int, int]) -> np.ndarray:
        return unpack_bits(*changed)

    return Case("edge: bitpack", mutant, feed, unsound, lambda: feed((packed, 13, 10)), (ValueError,))


def table_case() -> Case:
    soft = np.array([[0.5, 0.25, 0.25], [0, 1, 0]], np.float32)
    table = ClassTable.of("soft-label", 3, [0, 2], soft)

    def mutant(rng: Random) -> Any:
        proto, vectors = table.to_proto(), table.vectors
        if rng.random() < 0.6:
            proto = cast(pb.ClassTable, mutate_proto(proto, rng))
        else:
            vectors = mutate_arrays({"v": vectors}, rng).get("v", np.zeros((0, 3), np.float32))
        return proto, vectors

    def feed(changed: Any) -> ClassTable:
        made = ClassTable.from_proto(changed[0], changed[1], "c0").validate(
            "c0", kind="soft-label", classes=3
        )
        return merge([made, table]).without(table)

    def unsound(changed: Any, made: ClassTable) -> str:
        sums = made.vectors.sum(1)
        good = np.isfinite(made.vectors).all() and np.allclose(sums, 1, atol=1e-3) and (made.counts > 0).all()
        return "" if good else "no distribution"

    return Case("edge: ClassTable", mutant, feed, unsound, lambda: feed((table.to_proto(), table.vectors)))


def given_case() -> Case:
    table = ClassTable.of("prototype", 3, [0, 2], RNG.normal(size=(2, 4)).astype(np.float32))
    arrays = given_arrays(table, 3)

    def feed(changed: dict[str, np.ndarray]) -> ClassTable | None:
        return given_table(changed, "prototype", 3, "edge-1")

    def unsound(changed: Any, made: ClassTable | None) -> str:
        good = made is None or (np.isfinite(made.vectors).all() and np.isfinite(made.counts).all())
        return "" if good else "a table that is not finite"

    return Case(
        "client: class table", lambda rng: mutate_arrays(arrays, rng), feed, unsound, lambda: feed(arrays)
    )


def pairs_case() -> Case:
    images = RNG.uniform(-1, 1, size=(2, 1, 8, 8)).astype(np.float32)
    arrays = Pairs(images, RNG.normal(size=(2, 4)).astype(np.float32)).arrays()

    def feed(changed: dict[str, np.ndarray]) -> Pairs | None:
        return Pairs.received(changed, (1, 8, 8), "edge-1")

    def unsound(changed: Any, made: Pairs | None) -> str:
        if made is None:
            return ""
        floats = made.floats()
        good = (
            floats.shape[1:] == (1, 8, 8) and np.isfinite(floats).all() and len(floats) == len(made.centroids)
        )
        return "" if good else "pairs that do not fit"

    return Case(
        "client: image-vector pairs",
        lambda rng: mutate_arrays(arrays, rng),
        feed,
        unsound,
        lambda: feed(arrays),
    )


# --- signatures ------------------------------------------------------------------------------------


def signature_case() -> Case:
    plan = pb.RoundPlan(schema=1, run="r", window=1, round=1, client="c0", edge="edge-1", nonce=b"n" * 16)
    report = pb.ClientReport(schema=1, run="r", window=1, round=1, client="c0", samples=30, loss=0.5)
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
    signed = sign(pb.UpdateStatement(schema=1, run="r", client="c0"), KEY)

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


# --- Flower's own messages -----------------------------------------------------------------------------


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


def relay_case() -> Case:
    def reply(value: float) -> RecordDict:
        arrays = ArrayRecord({"w": array_from_numpy(np.full((2, 2), value, np.float32))})
        numbers = MetricRecord({"num-examples": 10, "loss": value, "per": [value, 1.0]})
        return RecordDict({"arrays": arrays, "metrics": numbers})

    good = [reply(1.0), reply(3.0)]
    reference = ReplySum()
    for content in good:
        reference.add(content, "node 1")
    wanted = reference.content()

    def feed(changed: RecordDict) -> tuple[bool, RecordDict]:
        total = ReplySum()
        total.add(good[0], "node 1")
        try:
            total.add(changed, "node 2")
            refused = None
        except WireError as error:
            refused = error
        total.add(good[1], "node 3")
        content = total.content()
        if refused is not None:
            same = all(
                np.array_equal(numpy_view(a), numpy_view(content.array_records["arrays"][n]))
                for n, a in wanted.array_records["arrays"].items()
            )
            if not same or content["metrics"] != wanted["metrics"]:
                raise AssertionError(f"refused, and yet in the sum ({refused})")
            raise refused
        return True, content

    def unsound(changed: RecordDict, made: tuple[bool, RecordDict]) -> str:
        arrays = {n: numpy_view(a) for n, a in made[1].array_records["arrays"].items()}
        numbers = [v for v in made[1].metric_records["metrics"].values() if not isinstance(v, list)]
        return "" if finite(arrays) and np.isfinite(numbers).all() else "a sum that is not finite"

    return Case(
        "edge: plain app's reply",
        lambda rng: mutate_content(good[0], rng),
        feed,
        unsound,
        lambda: feed(good[0]),
    )


def monitor_case() -> Case:
    from rich.console import Console

    from common.monitor.ask import as_dict
    from common.monitor.text import exit_status, render, troubles

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


# --- a client, and what a hostile server sends it -------------------------------------------------------------


def plan_case(name: str, **settings: Any) -> Case:
    made = call(device(), **settings)
    plan = made.plan()
    content = control.plan_content(plan, made.sent.to_record())
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
    content = control.plan_content(plan, made.sent.to_record())

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
    from common.models.architecture import describe

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


# --- an edge, and what a hostile cloud or client sends it -------------------------------------------------------


def window_case(recording: Recording) -> Case:
    scene = recording.edges[0]
    content = control.plan_content(scene.plan, scene.weights.to_record())

    def feed(changed: RecordDict) -> tuple[pb.WindowPlan, pb.EdgeReport, Weights]:
        message = Message(changed, 1, control.TRAIN)
        plan = control.decode(pb.WindowPlan, control.plan_bytes(message), "cloud")
        weights = control.read_weights(message, control.plan_layout(plan, "cloud"), "cloud")
        grid, roster = cast(Any, Replay({})), cast(Any, Fixed(scene.known))
        window = EdgeWindow(scene.edge, plan, weights, grid, roster, EdgeProgress())
        return plan, *(window.inquire() if plan.inquiry else window.run())

    def unsound(changed: RecordDict, made: tuple[pb.WindowPlan, pb.EdgeReport, Weights]) -> str:
        return "" if not made[1].samples and finite(made[2].views()) else "samples of nobody"

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

    def feed(changed: RecordDict) -> tuple[pb.EdgeReport, Weights]:
        report, payload = scene.play(victim, changed)
        if victim in {c.client for r in report.rounds for c in r.clients}:
            return report, payload
        [fault] = [f for f in report.faults if f.node == victim]
        if meaning(report, payload) != without:
            raise AssertionError("refused, and yet in the sums")
        raise WireError(victim, fault.detail)

    def unsound(changed: RecordDict, made: tuple[pb.EdgeReport, Weights]) -> str:
        report, payload = made
        if signed:
            return "" if meaning(report, payload) == whole else "a change of what was signed was let in"
        others = {c.client for r in report.rounds for c in r.clients}
        numbers = [c.samples for r in report.rounds for c in r.clients] + list(report.metrics.values())
        if not set(scene.clients) <= others or not np.isfinite(numbers).all():
            return "the others' updates are lost, or a number is not finite"
        if fault := payload.not_finite():
            return f"the edge's sums: {fault}"
        wire(report)
        return ""

    kind = "signed" if signed else "unsigned"
    return Case(
        f"edge: ClientReport of {name}, {kind}", mutant, feed, unsound, lambda: feed(original), share=0.6
    )


def meaning(report: pb.EdgeReport, payload: Weights) -> tuple[Any, ...]:
    """Return what an edge's report comes to, bit for bit."""
    arrays = {n: (a.dtype.str, a.shape, a.tobytes()) for n, a in payload.views().items()}
    who = [(r.round, sorted((c.client, c.samples, c.loss) for c in r.clients)) for r in report.rounds]
    return arrays, who, report.samples, dict(report.metrics)


def report_case(name: str, recording: Recording, *, bare: bool = False) -> Case:
    """Return the case of a cloud with an honest edge and one whose report is changed."""
    scene = recording.clouds[-1]
    node = min(scene.replies)
    original = scene.replies[node]
    _, without, _ = scene.play(node)
    reference = {n: a.tobytes() for n, a in without.tensors.items()}

    def feed(changed: RecordDict) -> Any:
        outcome, state, samples = scene.play(node, changed)
        for fault in outcome.faults:
            json.dumps([fault.node, fault.detail])
        if f"edge-{node}" in outcome.reports:
            return outcome, state, samples
        if {n: a.tobytes() for n, a in state.tensors.items()} != reference:
            raise AssertionError("refused, and yet in the model")
        [fault] = [f for f in outcome.faults if f.node == f"edge-{node}"]
        raise WireError(fault.node, fault.detail)

    def unsound(changed: RecordDict, made: Any) -> str:
        _, state, _ = made
        return "" if finite(state.tensors) else "a model that is not finite"

    def mutant(rng: Random) -> RecordDict:
        return mutate_content(original, rng, [(control.REPORT, control.PLAN, pb.EdgeReport)])

    return Case(f"cloud: EdgeReport of {name}", mutant, feed, unsound, lambda: feed(original), share=0.6)


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
        twin.grid = cast(Any, OneReply(node, message, tree.grid))
        before = len(twin.faults)
        twin.greet(everyone=True)
        twin.members(), twin.roster()
        if len(twin.faults) > before and twin.faults[-1].tier == "cloud":
            raise WireError(twin.faults[-1].node, twin.faults[-1].detail)
        return twin

    def unsound(data: bytes, twin: Any) -> str:
        return (
            "" if all(np.isfinite(m.labels).all() for m in twin.members()) else "labels that are not finite"
        )

    return Case("cloud: EdgeHello", mutant, feed, unsound, lambda: feed(wire(hello)), share=0.5)


class OneReply:
    """A grid on which one edge answers what it is told, and the others nothing."""

    def __init__(self, node: int, content: Message, grid: Any) -> None:
        self._node, self._content, self._grid = node, content.content, grid

    def get_nodes(self) -> Any:
        return self._grid.get_nodes()

    def get_node_ids(self) -> Any:
        return self._grid.get_node_ids()

    def exchange(self, messages: Any, **_: Any) -> Any:
        for message in messages:
            if message.metadata.dst_node_id == self._node and message.metadata.message_type == control.HELLO:
                yield Message(self._content, reply_to=message)


# --- the table ---------------------------------------------------------------------------------------


def wire_cases() -> list[Case]:
    """Return the decoders that need no run."""
    return [
        proto_case(
            "all: WindowPlan bytes",
            pb.WindowPlan(schema=1, run="r", window=1, rounds=[pb.RoundSchedule(round=1)]),
        ),
        proto_case("all: RoundPlan bytes", pb.RoundPlan(schema=1, run="r", client="c0", returns=["w"])),
        proto_case(
            "all: ClientReport bytes", pb.ClientReport(schema=1, run="r", client="c0", metrics={"a": 1.0})
        ),
        proto_case("all: EdgeReport bytes", pb.EdgeReport(schema=1, run="r", edge="edge-1", samples=3)),
        proto_case("all: EdgeHello bytes", EDGE_HELLO),
        proto_case("all: Progress bytes", PROGRESS),
        hello_case(),
        layout_case(),
        weights_case(),
        view_case(),
        codec_case(codec="none"),
        codec_case(codec="fp16"),
        codec_case(codec="bf16"),
        codec_case(codec="qsgd", **{"codec-levels": 5}),
        codec_case(codec="top-k", **{"codec-keep": 0.2}),
        bits_case(),
        table_case(),
        given_case(),
        pairs_case(),
        signature_case(),
        verify_case(),
        key_case(),
        object_case(),
        run_record_case(),
        relay_case(),
        monitor_case(),
    ]


def client_cases() -> list[Case]:
    """Return what a client reads."""
    return [
        plan_case("fedavg", method="fedavg", model="mlp"),
        plan_case("fedphd", method="fedphd", model="unet-tiny"),
        plan_case("feddyn", method="feddyn", model="mlp", codec="qsgd"),
        inquiry_case(),
        side_case(),
        architecture_case("mlp", (1, 8, 8), method="fedavg", model="mlp"),
        architecture_case("unet-tiny", (1, 8, 8), model="unet-tiny"),
    ]


def tree_cases(recordings: dict[str, Recording]) -> list[Case]:
    """Return what edges and a cloud read, by recorded runs."""
    first = next(iter(recordings.values()))
    found = [window_case(first), edge_hello_case(first)]
    for name, recording in recordings.items():
        found.append(reply_case(name, recording, signed=False))
        found.append(report_case(name, recording))
    found.append(reply_case(next(iter(recordings)), first, signed=True))
    return found


#: Runs whose messages are mutated: plain sums, codes, tables, forwarded tensors, slices, own networks.
RUNS: dict[str, dict[str, Any]] = {
    "fedavg, qsgd": {"method": "fedavg", "codec": "qsgd"},
    "q-fedavg": {"method": "qfedavg", "fairness-q": 2.0},
    "fd": {"method": "fd"},
    "feddyn": {"method": "feddyn", "codec": "bf16"},
    "heterofl": {"method": "heterofl", "levels": "1,0.5"},
    "cfl": {"method": "cfl"},
    "codistillation": {"method": "codistillation"},
}
