"""Mutated messages that were once accepted: each is refused, and its sender named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from espalier.errors import WireError
from espalier.flower.arrays import array_from_numpy, numpy_view
from espalier.flower.payloads import PayloadError, pack, unpack
from espalier.flower.run_info import parse_run_record
from espalier.methods.aggregate import ROWS_SECTION, Aggregate
from espalier.methods.cfl import ABOUT, DELTA
from espalier.methods.codistillation import COPY
from espalier.methods.faug import seeds_layout
from espalier.methods.ifca import cluster
from espalier.methods.registry import create_method
from espalier.methods.run_config import RunConfig
from espalier.methods.state import CloudState
from espalier.security.name_registry import NameRegistry
from espalier.wire import control
from espalier.wire.hello import MAX_SAMPLES, check_client_hello
from espalier.wire.payload import Layout, Weights
from espalier.wire.sections import GRADIENT, MODEL, Payload, SectionId, Sections
from espalier_client.inquiry import answer
from espalier_client.training import evaluate_plain, train_round
from espalier_edge.relay import ReplySum
from espalier_proto import espalier_pb2 as pb
from espalier_server.client_keys import ClientKeys
from espalier_server.commands.formatting import duration, spark
from espalier_server.planning.tree import Tree
from tests.support.calls import call, device
from tests.unit.espalier_edge.test_rounds import NODES, SAMPLES, add_one, means, reply_to, window

SPEC = pb.TensorSpec(name="w", dtype="float32", shape=[2])


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ([1] * 33, "33 dimensions"),
        ([2**32 - 1] * 1_000_000, "1000000 dimensions"),  # multiplying them took minutes
        ([0, 2**32 - 1, 2**32 - 1, 2**32 - 1], "more than"),  # no element, and numpy refuses the shape
    ],
)
def test_a_layout_that_numpy_cannot_have(shape: list[int], words: str) -> None:
    with pytest.raises(WireError, match=f"'c0' refused: tensor 'w' has .*{words}"):
        Layout.from_proto([pb.TensorSpec(name="w", dtype="float32", shape=shape)], "c0")


def test_an_npy_header_that_the_parser_stumbles_over() -> None:
    """Numpy lets TokenError through, which ended the window of all clients of an edge."""
    array = array_from_numpy(np.zeros(2, np.float32))
    data = array.data.replace(b"'shape': (2,)", b"'shape': (2,(")
    with pytest.raises(ValueError, match="header"):
        numpy_view(Array(array.dtype, (2,), array.stype, data))
    weights = Weights.pack({"w": np.zeros(2, np.float32)})
    with pytest.raises(WireError, match="'c0' refused: the float32 buffer cannot be read"):
        Weights.from_record(
            ArrayRecord({"float32": Array("float32", (2,), array.stype, data)}), weights.layout, "c0"
        )


def test_a_finite_number_that_spoils_a_sum() -> None:
    """Twice 3e38 is infinite: one client made the edge's whole report one that the cloud refuses."""

    def answer(plan: pb.RoundPlan, payload: Payload, message: Message) -> Message:
        if plan.client == "c1":
            return add_one(plan, payload, message)
        return reply_to(plan, message, {n: np.full_like(v, 3e38) for n, v in payload[MODEL].views().items()})

    edge, _ = window(answer)
    report, payload = edge.run()
    [fault] = report.faults
    assert (fault.node, fault.kind) == ("c2", "refused")
    assert "a value too large to be added up" in fault.detail
    np.testing.assert_array_equal(means(report, payload)["w"], np.ones((2, 2)))


def test_bytes_that_no_signature_covers_are_not_believed() -> None:
    """Two claims of 2^64 - 1 were more than a field holds, and the window was lost."""

    def answer(plan: pb.RoundPlan, payload: Payload, message: Message) -> Message:
        return reply_to(plan, message, payload[MODEL].views(), up_bytes=2**64 - 1)

    edge, _ = window(answer)
    report, _ = edge.run()
    assert report.samples == sum(SAMPLES.values())
    assert report.client_edge.up_bytes < 10_000


def test_a_method_that_stumbles_over_a_reply_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric of 1e300, raised to a power, is an OverflowError."""

    def answer(plan: pb.RoundPlan, payload: Payload, message: Message) -> Message:
        metrics = {"received-loss": 1e300 if plan.client == "c2" else 0.5, "lr-sum": 0.1}
        return reply_to(plan, message, payload[MODEL].views(), metrics=metrics)

    edge, _ = window(answer, **dict[str, Any]({"method": "qfedavg", "fairness-q": 5.0}))
    report, _ = edge.run()
    assert [c.client for c in report.rounds[0].clients] == ["c1"]
    assert [(f.node, f.kind) for f in report.faults] == [("c2", "refused")]
    assert set(NODES) == {"c1", "c2"}


def test_hellos_that_cannot_be_added_up() -> None:
    hello = pb.ClientHello(name="c", samples=2, image_shape=[1, 8, 8], classes=["a", "b"])
    hello.histogram.counts.extend([1e308, 1e308])
    with pytest.raises(WireError, match="counts cannot be added up"):
        check_client_hello(hello, "c")
    hello.histogram.counts[:] = [1, 1]
    hello.histogram.noisy, hello.samples = True, 2**64 - 1
    with pytest.raises(WireError, match=f"samples, more than {MAX_SAMPLES}"):
        check_client_hello(hello, "c")


def test_a_configuration_nested_without_end() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_run_record(ConfigRecord({"run": "r", "config": b"[" * 100_000}))


def test_an_array_that_repeats_one_chunk_beyond_memory() -> None:
    """A few characters name a chunk of 1 MiB eight million times."""
    record = ArrayRecord({"w": array_from_numpy(np.zeros(2**18, np.float32))})
    packed = pack(Message(RecordDict({"arrays": record}), 1, "train"))
    objects = {i: packed.content(i) for i in packed.objects}
    [name] = [i for i, c in objects.items() if c.startswith(b"Array ")]
    head, _, body = objects[name].partition(b"\x00")
    assert b"[0]" in body
    body = body.replace(b"[0]", b"[" + b"0, " * 2_000 + b"0]")
    objects[name] = head.rpartition(b" ")[0] + f" {len(body)}".encode() + b"\x00" + body
    with pytest.raises(PayloadError, match="repeats its chunks"):
        unpack(packed.message_id, objects)


@pytest.mark.parametrize("seeds", [float("inf"), float("nan"), 1e300, -1.0, 0.5])
def test_an_absurd_number_of_seeds(seeds: float) -> None:
    with pytest.raises(ValueError, match="seed images"):
        seeds_layout({"seeds": seeds}, (1, 8, 8))


def reply(**metrics: Any) -> RecordDict:
    arrays = ArrayRecord({"w": array_from_numpy(np.ones(2, np.float32))})
    numbers: dict[str, Any] = {"num-examples": 10, "loss": 1.0, "per": [1.0, 2.0]} | metrics
    return RecordDict({"arrays": arrays, "metrics": MetricRecord(numbers)})


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (reply(**{"num-examples": float("inf")}), "num-examples is"),
        (reply(per=[1.0]), "could not be broadcast|another shape"),  # its arrays were in the sum already
        (reply(per=[1.0, float("nan")]), "not finite"),
        (
            reply(loss=[1.0, 1.0]),
            "'loss' has another shape",
        ),  # taken, and the next reply refused for it
    ],
)
def test_a_plain_apps_reply_is_added_up_whole_or_not_at_all(bad: RecordDict, words: str) -> None:
    total = ReplySum()
    total.add(reply(), "node 1")
    with pytest.raises(WireError, match=f"'node 2' refused: .*({words})"):
        total.add(bad, "node 2")
    total.add(reply(), "node 3")
    content = total.content()
    assert content.metric_records["metrics"]["num-examples"] == 20
    np.testing.assert_array_equal(numpy_view(content.array_records["arrays"]["w"]), [1, 1])


def test_replies_without_any_example_have_no_mean() -> None:
    total = ReplySum()
    total.add(reply(**{"num-examples": 0}), "node 1")
    with pytest.raises(WireError, match="no mean"):
        total.content()


def test_a_live_view_of_times_that_are_none() -> None:
    assert duration(float("inf")) == duration(float("nan")) == "?"
    assert spark([float("nan")]) == ""
    assert len(spark([1.0, float("inf"), 2.0])) == 2


def cloud_state(section: SectionId) -> CloudState:
    payload = Payload.pack({section: {"w": np.zeros(2, np.float32)}})
    return CloudState(pb.ArchitectureSpec(tensors=[SPEC]), payload)


#: A tensor that fits `SPEC`, and one that describes it.
W: dict[str, np.ndarray] = {"w": np.zeros(2, np.float32)}
DESCRIBED = np.frombuffer(pb.ArchitectureSpec(tensors=[SPEC]).SerializeToString(), np.uint8)


@pytest.mark.parametrize(
    ("method", "sections", "words"),
    [
        ("codistillation", {COPY: W}, "without a description"),
        ("codistillation", {ABOUT: {"architecture": DESCRIBED}}, "tensor 'w' is missing"),
        (
            "codistillation",
            {ABOUT: {"architecture": DESCRIBED}, SectionId("guess"): W},
            "tensor 'w' is missing",
        ),
        ("cfl", {DELTA: W}, "without its cluster and weight"),
        (
            "cfl",
            {ABOUT: {"weight": np.array(1.0), "cluster": np.array(7)}, DELTA: W},
            "does not fit the model of cluster 7",
        ),
        (
            "cfl",
            {ABOUT: {"weight": np.array(1.0), "cluster": np.array(0)}},
            "does not fit the model of cluster 0",
        ),
        ("fedavg", {GRADIENT: {"x": np.zeros(2, np.float32)}}, "not a gradient of the network"),
    ],
)
def test_what_an_edge_passes_on_is_looked_at(method: str, sections: Sections, words: str) -> None:
    """A KeyError in the method's step ended the cloud's run."""
    made = create_method(RunConfig.from_flat({"method": method, "model": "cnn"}))
    state = cloud_state(cluster(0) if method == "cfl" else MODEL)
    with pytest.raises(ValueError, match=re.escape(words)):
        made.check_forwarded({"c0": sections}, {}, state)
    with pytest.raises(ValueError, match="were not requested"):
        made.check_forwarded({}, {"labels": np.zeros(1)}, state)


def test_rows_are_refused_before_anything_is_added() -> None:
    layout = Layout((Layout.of({"w": np.zeros(2, np.float32)}).tensors[0],))
    tally = Aggregate({MODEL: layout})
    tally.mean({MODEL: {"w": np.ones(2, np.float32)}}, 1.0)
    tally.rows({"labels": np.zeros(1, np.int64), "vectors": np.zeros((1, 3), np.float32)})
    other: dict[SectionId, dict[str, np.ndarray]] = {
        MODEL: {"w": np.full(2, 9, np.float32)},
        ROWS_SECTION: {"labels": np.zeros(1, np.int64), "vectors": np.zeros((1, 4))},
    }
    with pytest.raises(ValueError, match="unlike the others"):
        tally.absorb(Payload.pack(other), {"weight": 1.0})
    assert tally.weight == 1
    np.testing.assert_array_equal(tally.means({})[MODEL]["w"], [1, 1])


@pytest.mark.parametrize("weight", [1e300, float("nan"), -1.0])
def test_absurd_weights(weight: float) -> None:
    tally = Aggregate({MODEL: Layout.of({"w": np.zeros(2, np.float32)})})
    with pytest.raises(ValueError, match="weight"):
        tally.mean({MODEL: {"w": np.ones(2, np.float32)}}, weight)
    with pytest.raises(ValueError, match="weight"):
        tally.absorb(Payload.pack({MODEL: {"w": np.ones(2, np.float32)}}), {"weight": weight})


def test_one_invalid_progress_hides_no_other(tmp_path: Path) -> None:
    class Grid:
        """Two edges, of which the first answers badly."""

        def exchange(self, messages: Any, **_: Any) -> Any:
            for number, message in enumerate(list(messages)):
                progress = pb.Progress(schema=9 if number == 0 else control.SCHEMA, run="r", window=1)
                yield Message(control.control_content(progress), reply_to=message)

        def get_node_ids(self) -> list[int]:
            return [1, 2]

    tree = Tree(cast(Any, Grid()), NameRegistry(tmp_path / "e.json"), "r", 0.0, ClientKeys(tmp_path))
    tree._edges = {1: pb.EdgeHello(name="edge-1"), 2: pb.EdgeHello(name="edge-2")}
    assert list(tree.progress(1)) == [2]


def test_a_tensor_that_is_to_come_back_and_was_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a bare ValueError, and only after the client had trained."""
    made = call(device(), method="fedavg", model="mlp")
    plan = made.plan()
    plan.returns.extend([*made.sent[MODEL].layout.names, "\u202e"])
    monkeypatch.setattr("espalier_client.training.train", lambda *_, **__: pytest.fail("it trains"))
    with pytest.raises(
        WireError, match=r"'edge-1' refused: a plan that returns the tensor .+, which was not sent"
    ):
        train_round(made.device, plan, made.message(plan, control.TRAIN))


def test_a_plan_of_a_run_whose_name_is_none(tmp_path: Path) -> None:
    """It was a StateError, which blames the device's own folder and not its edge."""
    made = call(device(state=tmp_path), method="fedavg", model="mlp")
    for inquiry in ("", "loss", "seeds"):
        plan = made.plan(run="../x", inquiry=inquiry)
        message = made.message(plan, control.INQUIRY if inquiry else control.TRAIN)
        with pytest.raises(WireError, match=re.escape("'edge-1' refused: a plan of run '../x'; a name is")):
            (answer if inquiry else train_round)(made.device, plan, message)


@pytest.mark.parametrize(
    "bad",
    [
        Array("float32", (2,), "pickle", b""),
        array_from_numpy(np.array(["a", "b"])),  # torch has no such dtype
    ],
)
def test_a_plain_servers_array_that_cannot_be_read(bad: Array) -> None:
    with pytest.raises(WireError, match="'server' refused: tensors that cannot be read"):
        evaluate_plain(device(), ArrayRecord({"w": bad}), 1, {"method": "fedavg", "model": "mlp"})
