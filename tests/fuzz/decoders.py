"""The table of all decoders: where bytes or records that came over a link, or from another machine's file, are read."""

from __future__ import annotations

from espalier.wire import control
from espalier_proto import espalier_pb2 as pb
from tests.fuzz.campaign import Case
from tests.fuzz.client_cases import architecture_case, inquiry_case, plan_case, side_case
from tests.fuzz.control_cases import (
    equal_replies_case,
    hello_case,
    key_case,
    monitor_case,
    object_case,
    proto_case,
    relay_case,
    run_record_case,
    signature_case,
    verify_case,
)
from tests.fuzz.examples import EDGE_HELLO, PROGRESS
from tests.fuzz.payload_cases import (
    bits_case,
    codec_case,
    given_case,
    layout_case,
    pairs_case,
    payload_case,
    sent_case,
    table_case,
    view_case,
    weights_case,
)
from tests.fuzz.recorded import Recording
from tests.fuzz.tree_cases import answers_case, edge_hello_case, reply_case, report_case, window_case


def wire_cases() -> list[Case]:
    """Return the decoders that need no run."""
    return [
        proto_case(
            "all: WindowPlan bytes",
            pb.WindowPlan(schema=control.SCHEMA, run="r", window=1, rounds=[pb.RoundSchedule(round=1)]),
        ),
        proto_case(
            "all: RoundPlan bytes", pb.RoundPlan(schema=control.SCHEMA, run="r", client="c0", returns=["w"])
        ),
        proto_case(
            "all: ClientReport bytes",
            pb.ClientReport(schema=control.SCHEMA, run="r", client="c0", metrics={"a": 1.0}),
        ),
        proto_case(
            "all: EdgeReport bytes", pb.EdgeReport(schema=control.SCHEMA, run="r", edge="edge-1", samples=3)
        ),
        proto_case("all: EdgeHello bytes", EDGE_HELLO),
        proto_case("all: Progress bytes", PROGRESS),
        hello_case(),
        layout_case(),
        layout_case(whole=True),
        payload_case(),
        weights_case(),
        view_case(),
        codec_case(codec="none"),
        codec_case(codec="fp16"),
        codec_case(codec="bf16"),
        codec_case(codec="qsgd", **{"codec-levels": 5}),
        codec_case(codec="top-k", **{"codec-keep": 0.2}),  # places as a mask
        codec_case(codec="top-k", **{"codec-keep": 0.02}),  # places as indices
        sent_case("fp16"),
        sent_case("bf16"),
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
        equal_replies_case(),
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
    name = next(iter(recordings))
    found.append(reply_case(name, first, signed=True))
    found.append(report_case(name, first, signed=False))
    found.append(answers_case(name, first))
    return found
