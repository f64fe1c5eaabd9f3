"""A client's round from plan to reply: what it keeps, what it sends, and that both ends read the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from torch import nn

from espalier.errors import WireError
from espalier.methods.registry import create_method
from espalier.methods.scaffold import CONTROL
from espalier.methods.state import ServerState
from espalier.methods.views import buffers_of
from espalier.models import model_cache
from espalier.training.objectives import TrainingError
from espalier.wire import control
from espalier.wire.codec_registry import create_codec
from espalier.wire.sections import GRADIENT, MODEL, SectionId
from espalier.wire.uplink import UplinkEncoding
from espalier_client import state
from espalier_client.training import as_read, train_round
from espalier_proto import espalier_pb2 as pb
from tests.support.calls import Call, call, device, payload_of, report_of

FAST: dict[str, Any] = {"model": "cnn", "batch_size": 16, "local_steps": 3}


def trained(made: Call, **changes: Any) -> tuple[RecordDict, pb.ClientReport]:
    plan = made.plan(**changes)
    content = train_round(made.device, plan, made.message(plan, control.TRAIN))
    return content, report_of(content)


def read_by_edge(made: Call, content: RecordDict) -> dict[str, np.ndarray]:
    """Decode a reply with what an edge has: the plan, what it sent, and the report."""
    method, plan, sent = create_method(made.settings), made.plan(), made.sent
    names = tuple(t.name for t in plan.architecture.tensors)
    layouts = method.reply_layouts(plan.architecture, sent.layouts, names, report_of(content))
    codec = method.chosen(made.settings, "codec")
    encoding = UplinkEncoding(
        layouts,
        sent.layouts,
        buffers_of(plan.architecture),
        None if codec == "none" else create_codec(made.settings, codec),
    )
    return encoding.decode(payload_of(content, encoding.wire), sent.views(), "c")[MODEL]


def with_control(made: Call, scale: float) -> Call:
    """Add a control variate to what is sent."""
    server = ServerState(made.plan().architecture, made.sent)
    server.add_section(CONTROL)
    rng = np.random.default_rng(0)
    made.sections = {
        CONTROL: {
            n: (scale * rng.normal(size=v.shape)).astype(np.float32)
            for n, v in server.section(CONTROL).items()
        }
    }
    return made


@pytest.mark.parametrize("codec", ["none", "fp16", "bf16", "qsgd", "top-k"])
def test_a_control_variate_is_made_of_what_the_edge_decodes(codec: str, tmp_path: Path) -> None:
    """c_k+ = c_k - c + (w - y)/(K eta), y being the decoded model: the edge's c stays the mean of all c_k."""
    keep = {"codec_keep": 0.1} if codec == "top-k" else {}
    made = with_control(call(device(state=tmp_path), method="scaffold", codec=codec, **keep, **FAST), 0.01)
    content, report = trained(made)
    y, w = read_by_edge(made, content), made.sent[MODEL].views()
    left = made.device.load_state("r", pb.Version(window=1, round=3))
    head = next(iter(left)).partition("/")[0]
    compared = 0
    for own, c in made.sections[CONTROL].items():
        expected = -c + (w[own] - y[own]) / np.float32(report.metrics["lr-sum"])
        np.testing.assert_allclose(left[f"{head}/{own}"], expected, rtol=1e-4, atol=1e-5, err_msg=own)
        compared += 1
    assert compared == len([k for k in left if k.startswith(head)]) > 3
    # Coded, what is read is not what was trained.
    plain = with_control(call(device(), method="scaffold", **FAST), 0.01)
    exact = read_by_edge(plain, trained(plain)[0])
    same = all(np.array_equal(exact[n], y[n]) for n in exact)
    assert same == (codec == "none")


def test_the_same_plan_gives_the_same_reply() -> None:
    made = call(device(), method="fedavg", **FAST)
    first, again = (read_by_edge(made, trained(made)[0]) for _ in range(2))
    other = read_by_edge(made, trained(made, round=4)[0])
    assert all(np.array_equal(first[n], again[n]) for n in first)
    assert any(not np.array_equal(first[n], other[n]) for n in first)


def test_the_report_of_a_round() -> None:
    made = call(device(), method="fedavg", learning_rate=0.1, **FAST)
    plan = made.plan()
    message = made.message(plan, control.TRAIN)
    before = bytes(message.content.array_records[control.ARRAYS]["float32"].data)
    content = train_round(made.device, plan, message)
    report = report_of(content)
    assert (report.samples, report.steps) == (len(made.device.images), 3)
    assert report.metrics["lr-sum"] == pytest.approx(0.3)
    assert bytes(message.content.array_records[control.ARRAYS]["float32"].data) == before
    assert content.metric_records[control.METRICS][control.NUM_EXAMPLES] == report.samples
    assert report.up_bytes == 0  # its edge measures it
    moved = read_by_edge(made, content)
    assert all(not np.array_equal(moved[n], v) for n, v in made.sent[MODEL].views().items())


def test_statistics_and_counters_are_not_coded() -> None:
    """At one number in a hundred every coded tensor would keep most numbers; statistics all move."""
    made = call(device(), method="fedavg", codec="top-k", codec_keep=0.01, **(FAST | {"model": "cnn-bn"}))
    content, _ = trained(made)
    coded = read_by_edge(made, content)
    plain = call(device(), method="fedavg", **(FAST | {"model": "cnn-bn"}))
    exact, sent = read_by_edge(plain, trained(plain)[0]), made.sent[MODEL].views()
    buffers = buffers_of(made.plan().architecture)
    assert {n.rpartition(".")[2] for n in buffers} == {"running_mean", "running_var", "num_batches_tracked"}
    for name in buffers:
        np.testing.assert_array_equal(coded[name], exact[name], err_msg=name)
        assert coded[name].dtype == sent[name].dtype
    kept = sum(int((coded[n] != sent[n]).sum()) for n in coded if n not in buffers)
    size = sum(v.size for n, v in sent.items() if n not in buffers)
    assert 0 < kept <= 0.011 * size


def test_a_client_starts_from_the_version_in_the_plan(tmp_path: Path) -> None:
    """Adam's moments of window 1 round 3 or none at all: the next round differs."""
    made = call(device(state=tmp_path), method="fedavg", optimizer="adam", **FAST)
    plan = made.plan(round=4)
    fresh = read_by_edge(made, train_round(made.device, plan, made.message(plan, control.TRAIN)))
    trained(made)
    plan.start.CopyFrom(pb.Version(window=1, round=3))
    onwards = [
        read_by_edge(made, train_round(made.device, plan, made.message(plan, control.TRAIN)))
        for _ in range(2)
    ]
    assert all(np.array_equal(onwards[0][n], onwards[1][n]) for n in fresh)
    assert any(not np.array_equal(onwards[0][n], fresh[n]) for n in fresh)


# --- plans that are refused ------------------------------------------------------------------------------


def test_a_plan_for_another_client_is_refused() -> None:
    made = call(device(), method="fedavg", **FAST)
    with pytest.raises(WireError, match="'edge-1' refused: a plan for client 'd', this is 'c'"):
        trained(made, client="d")


def test_settings_a_client_does_not_take_are_refused() -> None:
    made = call(device(), method="fedavg", **FAST)
    plan = made.plan()
    plan.settings.update({"rounds": "many"})
    with pytest.raises(WireError, match=r"settings that this client rejects(?s:.*)rounds"):
        train_round(made.device, plan, made.message(plan, control.TRAIN))


def test_an_architecture_that_cannot_be_built_is_refused() -> None:
    made = call(device(), method="fedavg", **FAST)
    plan = made.plan()
    plan.architecture.family = "orchard"
    with pytest.raises(WireError, match="'edge-1' refused: an architecture that cannot be built"):
        train_round(made.device, plan, made.message(plan, control.TRAIN))


def test_a_payload_of_another_length_is_refused() -> None:
    made = call(device(), method="fedavg", **FAST)
    plan = made.plan()
    del plan.sections[0].layout.tensors[-1]
    with pytest.raises(WireError, match="buffer has shape"):
        train_round(made.device, plan, made.message(plan, control.TRAIN))


# --- what servers read ---------------------------------------------------------------------------------------


def test_servers_read_decoded_values_under_any_name() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.full((2,), v)) for v in (1.0, 2.0, 3.0))

    one = SectionId("cluster", "1")
    decoded = {
        MODEL: {"a": np.full(2, 10, np.float32)},
        one: {"b": np.full(2, 20, np.float32)},
        GRADIENT: {"c": np.full(2, 30, np.float32)},
    }
    received = {
        MODEL: {n: np.zeros(2, np.float32) for n in ("a", "c")},
        SectionId("cluster", "0"): {"b": np.zeros(2, np.float32)},
        one: {"b": np.zeros(2, np.float32)},
    }
    found = as_read(Small(), decoded, received)
    # a was coded; b left as a cluster's; c stayed at home, its gradient is no model tensor.
    assert {n: t.tolist() for n, t in found.items()} == {"a": [10.0] * 2, "b": [20.0] * 2, "c": [3.0] * 2}


UNET: dict[str, Any] = {"model": "unet-tiny", "batch_size": 8, "local_steps": 2}


@pytest.fixture
def clear_caches(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what makes a process as if it had trained nothing yet."""

    def forget() -> None:
        monkeypatch.setattr(model_cache, "_idle", {})
        monkeypatch.setattr(state, "_cache", state._StateCache(state.CACHE_BYTES))

    forget()
    return forget


def test_rounds_in_one_process_equal_rounds_in_new_ones(
    tmp_path: Path, clear_caches: Callable[[], None]
) -> None:
    """What is kept between rounds, layers and state, changes nothing: not after other methods, nor after a fault."""

    def rounds(folder: Path, fresh: bool) -> list[bytes]:
        found = []
        own, other = device(state=folder), device(name="d", state=folder / "d")
        first = call(own, method="fedphd", **UNET)
        between = call(other, method="moon", **UNET)
        broken = call(other, method="fedavg", learning_rate=1e30, clip_norm=0.0, **UNET)
        for round_ in (3, 4, 5):
            if fresh:
                clear_caches()
            elif round_ == 4:
                trained(between, round=round_)
            elif round_ == 5:
                with pytest.raises(TrainingError):
                    trained(broken, round=round_)
            plan = first.plan(round=round_)
            plan.start.CopyFrom(pb.Version(window=1, round=round_ - 1))
            content = train_round(own, plan, first.message(plan, control.TRAIN))
            report = report_of(content)
            found.append(b"".join(a.tobytes() for a in read_by_edge(first, content).values()))
            found.append(repr((report.loss, sorted(report.metrics.items()))).encode())
        return found

    kept_on = rounds(tmp_path / "a", fresh=False)
    assert model_cache._idle  # else nothing was compared
    assert kept_on == rounds(tmp_path / "b", fresh=True)
