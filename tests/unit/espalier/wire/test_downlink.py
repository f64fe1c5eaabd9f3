"""What servers send, and what edges report, in fewer bytes: both ends read the same numbers, and a run still learns."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from bench.local_tree import LocalClient, LocalTree
from flwr.app import Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from espalier.errors import ConfigError, WireError
from espalier.methods.run_config import RunConfig
from espalier.wire.downlink import DownlinkEncoding, read_downlink
from espalier.wire.payload import Layout, TensorSpec
from espalier.wire.sections import MODEL, Payload, SectionId, layouts_to_proto
from espalier.wire.traffic import CLIENT_EDGE, EDGE_CLOUD
from espalier_proto import espalier_pb2 as pb
from espalier_server.run import TreeRun

CONTROL = SectionId("control")
LAYOUTS = {
    MODEL: Layout(
        (
            TensorSpec("conv.weight", "float32", (4, 3)),
            TensorSpec("bn.mean", "float32", (4,)),
            TensorSpec("bn.count", "int64", ()),
        )
    ),
    CONTROL: Layout((TensorSpec("conv.weight", "float32", (4, 3)),)),
}
NETWORK = pb.ArchitectureSpec(
    tensors=[
        pb.TensorSpec(name="conv.weight", dtype="float32", shape=(4, 3)),
        pb.TensorSpec(name="bn.mean", dtype="float32", shape=(4,), buffer=True),
        pb.TensorSpec(name="bn.count", dtype="int64", buffer=True),
    ]
)


def encoding(downlink: str) -> DownlinkEncoding:
    return DownlinkEncoding(LAYOUTS, NETWORK, RunConfig(downlink=downlink))


def tensors(numbers: np.ndarray) -> Payload:
    model = {"conv.weight": numbers, "bn.mean": numbers[:, 0], "bn.count": np.array(2**40, np.int64)}
    return Payload.fill(LAYOUTS, {MODEL: model, CONTROL: {"conv.weight": -numbers}})


def assert_same(found: Payload, expected: Payload) -> None:
    assert list(found) == list(expected)
    for section, views in expected.views().items():
        for name, array in views.items():
            np.testing.assert_array_equal(found[section].views()[name], array)


@pytest.mark.parametrize(("downlink", "bits"), [("fp16", 11), ("bf16", 8)])
@given(numbers=arrays(np.float32, (4, 3), elements=st.floats(-1e4, 1e4, width=32)))
def test_receivers_read_what_the_server_says_they_read(downlink: str, bits: int, numbers: np.ndarray) -> None:
    payload, read = encoding(downlink).encode(tensors(numbers))
    assert payload.nbytes == 12 * 2 + 4 * 4 + 8 + 12 * 4
    received = encoding(downlink).decode(payload, "cloud")
    assert_same(received, read)
    # Half a unit in the last of the type's significant bits; below fp16's normal range half of its smallest step.
    near = np.maximum(np.abs(numbers) * 2.0**-bits, 2.0**-25)
    assert (np.abs(received[MODEL].views()["conv.weight"] - numbers) <= near).all()
    for name in ("bn.mean", "bn.count"):
        np.testing.assert_array_equal(received[MODEL].views()[name], tensors(numbers)[MODEL].views()[name])
    np.testing.assert_array_equal(received[CONTROL].views()["conv.weight"], -numbers)
    again, _ = encoding(downlink).encode(read)
    assert_same(again, payload)  # an edge passes on what it got


def test_without_a_downlink_codec_nothing_is_copied() -> None:
    whole = tensors(np.ones((4, 3), np.float32))
    payload, read = encoding("none").encode(whole)
    assert payload is whole
    assert read is whole


def test_an_edge_sends_the_very_payload_on_unless_its_tensors_have_moved() -> None:
    payload, _ = encoding("fp16").encode(tensors(np.full((4, 3), 0.1, np.float32)))
    records = payload.frozen().to_records()
    plan = pb.WindowPlan(architecture=NETWORK, sections=layouts_to_proto(LAYOUTS))
    message = cast(Message, SimpleNamespace(content=RecordDict(dict(records))))
    settings = RunConfig(downlink="fp16")
    came = read_downlink(message, plan, settings, "cloud", send_on=True)
    on, read = encoding("fp16").encode(came)
    # Neither rounded nor stored nor hashed again.
    sent = on.frozen().to_records()
    assert set(sent) == set(records) == {"arrays", "control"}
    assert all(sent[key] is records[key] for key in records)
    assert read is came
    other, _ = encoding("bf16").encode(came)
    assert other.layouts == encoding("bf16").wire
    doubled = {s: {n: 2 * a for n, a in arrays.items()} for s, arrays in came.views().items()}
    moved, _ = encoding("fp16").encode(Payload.fill(LAYOUTS, doubled))
    np.testing.assert_array_equal(moved[MODEL].views()["conv.weight"], 2 * on[MODEL].views()["conv.weight"])
    # A client does not send on, so it does not spend memory on that.
    assert read_downlink(message, plan, settings, "cloud")[MODEL].link is None


def test_a_payload_of_another_width_is_refused() -> None:
    plan = pb.WindowPlan(architecture=NETWORK, sections=layouts_to_proto(LAYOUTS))
    whole = RecordDict(dict(tensors(np.ones((4, 3), np.float32)).to_records()))
    message = cast(Message, SimpleNamespace(content=whole))
    with pytest.raises(WireError, match=r"cloud.*buffers"):
        read_downlink(message, plan, RunConfig(downlink="fp16"), "cloud")


# --- a tree ----------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "method": "fedavg",
    "model": "cnn",
    "rounds": 6,
    "rg": 3,
    "min-edges": 2,
    "min-clients": 4,
    "edge-choice": "fixed",
    "batch-size": 16,
    "local-steps": 4,
    "learning-rate": 0.05,
}


def run(folder: Path, name: str, **more: Any) -> TreeRun:
    clients = [LocalClient(f"c{i}", f"digits:{i}/16", (i % 2,)) for i in range(4)]
    return LocalTree(folder / name, clients).run(
        name, RUN | {k.replace("_", "-"): v for k, v in more.items()}
    )


def model_of(found: TreeRun) -> np.ndarray:
    assert found.state is not None
    views = {(s, n): a for s, found_in in found.state.payload.views().items() for n, a in found_in.items()}
    return np.concatenate([views[n].reshape(-1) for n in sorted(views) if views[n].dtype == np.float32])


def sent(found: TreeRun, link: str, way: str) -> int:
    """Return the bytes that the windows' plans and replies took on a kind of link."""
    return sum(int(getattr(w.links[link], way)) for w in found.recorder.record.windows)


def test_half_precision_halves_every_link_and_keeps_the_model(tmp_path: Path) -> None:
    whole = run(tmp_path, "whole")
    half = run(tmp_path, "half", downlink="fp16", codec="fp16", edge_codec="fp16")
    for link in (CLIENT_EDGE, EDGE_CLOUD):
        for way in ("up_bytes", "down_bytes"):
            assert sent(half, link, way) == pytest.approx(sent(whole, link, way) / 2, rel=0.1), (link, way)
    distance = np.linalg.norm(model_of(half) - model_of(whole)) / np.linalg.norm(model_of(whole))
    assert 0 < distance < 2e-3


def test_only_the_edges_reports_are_quantised(tmp_path: Path) -> None:
    whole = run(tmp_path, "whole")
    coded = run(tmp_path, "coded", edge_codec="qsgd", codec_levels=127)
    # 8 bits of 32; the norm, names and reports come on top.
    assert sent(coded, EDGE_CLOUD, "up_bytes") < 0.35 * sent(whole, EDGE_CLOUD, "up_bytes")
    assert sent(coded, EDGE_CLOUD, "down_bytes") == pytest.approx(
        sent(whole, EDGE_CLOUD, "down_bytes"), rel=0.01
    )
    distance = np.linalg.norm(model_of(coded) - model_of(whole)) / np.linalg.norm(model_of(whole))
    assert 0 < distance < 0.05


@pytest.mark.parametrize("method", ["heterofl", "scaffold", "ifca", "qfedavg", "fedphd", "divfl"])
def test_other_methods_run_over_narrow_links(tmp_path: Path, method: str) -> None:
    own: dict[str, Any] = {
        "fedphd": {"model": "unet-tiny", "prune_at": 3, "rounds": 6, "sample_steps": 1, "sample_count": 1},
        "heterofl": {"model": "cnn-bn"},
    }
    found = run(
        tmp_path,
        method,
        method=method,
        downlink="bf16",
        edge_codec="fp16",
        **own.get(method, {}),
    )
    record = found.recorder.record
    assert not record.faults
    assert np.isfinite(model_of(found)).all()
    assert all((w.rounds[-1].loss or 0) > 0 for w in record.windows)


def test_methods_without_a_common_network_take_no_codec() -> None:
    with pytest.raises(ConfigError, match="downlink"):
        RunConfig.from_flat({"method": "fd", "model": "cnn", "families": "cnn,mlp", "downlink": "fp16"})
