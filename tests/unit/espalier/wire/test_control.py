from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.errors import WireError
from espalier.wire import control
from espalier.wire.hello import check_client_hello
from espalier.wire.sections import MODEL
from espalier_proto import espalier_pb2 as pb


def plan() -> pb.RoundPlan:
    return pb.RoundPlan(schema=control.SCHEMA, run="r", window=1, round=2, client="cam-7", edge="edge-1")


def test_decode_round_trip() -> None:
    assert control.decode(pb.RoundPlan, plan().SerializeToString(), "edge-1") == plan()


def test_truncated() -> None:
    data = plan().SerializeToString()
    with pytest.raises(WireError, match="'edge-1' refused: a RoundPlan that is truncated"):
        control.decode(pb.RoundPlan, data[:-3], "edge-1")


def test_unknown_schema() -> None:
    other = plan()
    other.schema = control.SCHEMA + 1
    with pytest.raises(WireError, match=f"of schema {control.SCHEMA + 1}, this side uses {control.SCHEMA}"):
        control.decode(pb.RoundPlan, other.SerializeToString(), "edge-1")
    with pytest.raises(WireError, match="schema 0"):
        control.decode(pb.RoundPlan, b"", "edge-1")


def test_not_bytes() -> None:
    with pytest.raises(WireError, match="no RoundPlan in the message"):
        control.decode(pb.RoundPlan, None, "edge-1")


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_decoder(data: bytes) -> None:
    for kind in (pb.WindowPlan, pb.RoundPlan, pb.EdgeReport, pb.ClientReport, pb.ClientHello, pb.EdgeHello):
        with contextlib.suppress(WireError):
            accepted = control.decode(kind, data, "stranger")
            assert getattr(accepted, "schema", None) == control.SCHEMA


@pytest.mark.parametrize(("field", "value"), [("run", "other"), ("window", 9), ("round", 9)])
def test_foreign_reply(field: str, value: object) -> None:
    report = pb.ClientReport(schema=control.SCHEMA, run="r", window=1, round=2)
    control.check_same_run(plan(), report, "cam-7")
    setattr(report, field, value)
    with pytest.raises(WireError, match="a reply to"):
        control.check_same_run(plan(), report, "cam-7")


def hello() -> pb.ClientHello:
    return pb.ClientHello(
        schema=control.SCHEMA,
        name="cam-7",
        samples=5,
        histogram=pb.LabelHistogram(counts=[2, 3]),
        classes=["cat", "dog"],
        image_shape=[3, 32, 32],
    )


def test_good_hello() -> None:
    check_client_hello(hello(), "cam-7")
    noisy = hello()
    noisy.histogram.counts[:] = [0.2, 7.9]
    noisy.histogram.noisy = True
    check_client_hello(noisy, "cam-7")


@pytest.mark.parametrize(
    ("counts", "classes", "samples", "shape", "fault"),
    [
        ([2, 3, 0], ["cat", "dog"], 5, [3, 8, 8], "a label histogram of 3 counts for 2 classes"),
        ([2, -3], ["cat", "dog"], 5, [3, 8, 8], "negative or infinite"),
        ([2, float("nan")], ["cat", "dog"], 5, [3, 8, 8], "negative or infinite"),
        ([2, 3], ["cat", "dog"], 6, [3, 8, 8], "5 counts for 6 samples"),
        ([0, 0], ["cat", "dog"], 0, [3, 8, 8], "no training sample"),
        ([2, 3], ["cat", "dog"], 5, [8, 8], "image shape"),
        ([2, 3], ["cat", "dog"], 5, [3, 8, 0], "image shape"),
        ([], [], 5, [3, 8, 8], "0 classes"),
    ],
)
def test_bad_hello(
    counts: list[float], classes: list[str], samples: int, shape: list[int], fault: str
) -> None:
    bad = pb.ClientHello(
        samples=samples, histogram=pb.LabelHistogram(counts=counts), classes=classes, image_shape=shape
    )
    with pytest.raises(WireError, match=fault):
        check_client_hello(bad, "cam-7")


def test_a_hello_with_level_speed_and_link() -> None:
    full = hello()
    full.level, full.facts.speed, full.link_seconds = 1.0, 12.5, 0.02
    check_client_hello(full, "cam-7")
    full.level = 0.0625
    check_client_hello(full, "cam-7")


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("field", "fault"), [("level", "the level"), ("speed", "the speed"), ("link_seconds", "a link of")]
)
def test_bad_device_facts_are_refused_by_name(field: str, fault: str, value: float) -> None:
    bad = hello()
    setattr(bad.facts if field == "speed" else bad, field, value)
    with pytest.raises(WireError, match=f"cam-7.*{fault}"):
        check_client_hello(bad, "cam-7")


def test_a_level_above_the_whole_is_refused() -> None:
    bad = hello()
    bad.level = 1.5
    with pytest.raises(WireError, match=r"the level 1\.5, expected a share"):
        check_client_hello(bad, "cam-7")


def test_plans_with_one_layout_share_it_and_others_do_not() -> None:
    one, two = pb.RoundPlan(round=1), pb.RoundPlan(round=2)
    for plan in (one, two):
        plan.sections.add(name="model").layout.tensors.add(name="w", dtype="float32", shape=[2, 3])
    first = control.plan_sections(one, "edge")
    assert control.plan_sections(two, "edge") == first
    two.sections[0].layout.tensors[0].shape[0] = 4
    assert control.plan_sections(two, "edge")[MODEL].tensors[0].shape == (4, 3)
    # Without sections they are the network's own tensors.
    two.ClearField("sections")
    two.architecture.tensors.add(name="b", dtype="float32", shape=[5])
    assert {s: layout.names for s, layout in control.plan_sections(two, "edge").items()} == {MODEL: ("b",)}
    two.architecture.tensors.add(name="b", dtype="float32", shape=[5])
    for _ in range(2):
        with pytest.raises(WireError, match="repeated"):
            control.plan_sections(two, "edge")
