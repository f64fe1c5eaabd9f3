"""Sound messages that mutants are made of."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Message, RecordDict
from google.protobuf.message import Message as Proto

from espalier.wire import control
from espalier.wire.payload import STORED_AS, Layout
from espalier.wire.sections import Layouts, Payload, SectionId, Sections
from espalier_proto import espalier_pb2 as pb
from espalier_proto import monitor_pb2 as mpb

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
#: A payload with a section besides the network, whose two members share a record.
SECTIONS: dict[SectionId, dict[str, np.ndarray]] = {
    SectionId("model"): MODEL,
    SectionId("cluster", "0"): {"w": RNG.normal(size=3).astype(np.float32)},
    SectionId("cluster", "1"): {"w": RNG.normal(size=4).astype(np.float32), "n": np.array(3)},
}
LAYOUTS = {section: Layout.of(arrays) for section, arrays in SECTIONS.items()}

HELLO = pb.ClientHello(
    schema=control.SCHEMA,
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
    schema=control.SCHEMA,
    name="edge-1",
    clients=[HELLO],
    facts=HELLO.facts,
    faults=[pb.Fault(tier="edge", node="c1", kind="refused", detail="x")],
)
PROGRESS = pb.Progress(
    schema=control.SCHEMA, run="r", edge="edge-1", window=1, round=2, training=["c0"], done=["c1"], loss=0.5
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


def content_of(payload: Payload) -> Message:
    return Message(RecordDict(dict(payload.to_records())), 1, "train")


def all_fit(layouts: Layouts, sections: Sections, largest: float = 2.0**60) -> str:
    """Say where the views of a payload depart from its layouts; see `fits`."""
    faults = [fits(layout, dict(sections.get(s, {})), largest) for s, layout in layouts.items()]
    return "another section than was asked for" if set(sections) - set(layouts) else "".join(faults)


def fits(layout: Layout, views: dict[str, np.ndarray], largest: float = 2.0**60) -> str:
    """Say where views depart from a layout, or hold what is no number or too large for a sum."""
    for t in layout.tensors:
        a = views.get(t.name)
        if a is None or tuple(a.shape) != t.shape or a.dtype != STORED_AS[t.dtype]:
            return f"tensor {t.name!r} is not what its layout says"
    floats = [a for a in views.values() if a.dtype.kind == "f"]
    if not all(np.isfinite(a).all() for a in floats):
        return "a number that is not finite"
    return (
        ""
        if all(float(np.abs(a).max(initial=0)) <= largest for a in floats)
        else "a number that spoils a sum"
    )
