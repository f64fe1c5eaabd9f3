"""What a client answers when it is asked: against torch's own functions over all of its images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from espalier.errors import WireError
from espalier.methods.views import SAMPLES, answer_layouts
from espalier.wire import control
from espalier_client.inquiry import answer
from espalier_client.training import train_round
from espalier_proto import espalier_pb2 as pb
from tests.support.calls import Call, call, device, payload_of, report_of


def asked(made: Call, kind: str, **changes: Any) -> tuple[pb.ClientReport, dict[str, np.ndarray]]:
    plan = made.plan(inquiry=kind, **changes)
    content = answer(made.device, plan, made.message(plan, control.INQUIRY))
    layouts = answer_layouts(kind, plan.architecture, made.settings, plan.population)
    report = report_of(content)
    assert (report.client, report.round, report.samples) == ("c", plan.round, len(made.device.images))
    arrays = payload_of(content, layouts).views()
    return report, {n: a for own in arrays.values() for n, a in own.items()}


def everything(made: Call) -> tuple[Tensor, Tensor]:
    data = made.device.images
    return data.fetch(np.arange(len(data))), torch.from_numpy(np.asarray(data.labels))


@pytest.mark.parametrize("model", ["cnn", "cnn-bn", "mlp"])
def test_loss_is_the_mean_over_all_images(model: str) -> None:
    made = call(device(), method="fedavg", model=model, batch_size=7)
    images, labels = everything(made)
    assert len(labels) % 7, "the last batch must be a short one, or a mean of means passes"
    with torch.no_grad():
        expected = functional.cross_entropy(made.model.eval()(images), labels)
    report, arrays = asked(made, "loss")
    assert report.loss == pytest.approx(float(expected), rel=1e-5)
    assert arrays == {}


@pytest.mark.parametrize("model", ["cnn", "cnn-bn"])
def test_gradient_is_autograds_over_the_whole_batch(model: str) -> None:
    made = call(device(), method="fedavg", model=model, batch_size=7)
    images, labels = everything(made)
    functional.cross_entropy(made.model.eval()(images), labels).backward()  # type: ignore[no-untyped-call]
    expected = {f"{n}": p.grad.numpy() for n, p in made.model.named_parameters() if p.grad is not None}
    _, arrays = asked(made, "gradient")
    assert set(arrays) == set(expected)
    for name, gradient in expected.items():
        np.testing.assert_allclose(arrays[name], gradient, rtol=1e-3, atol=1e-6, err_msg=name)
    assert max(float(np.abs(g).max()) for g in expected.values()) > 1e-3


def test_batch_loss_is_that_of_one_seeded_batch() -> None:
    made = call(device(), method="fedavg", model="cnn", batch_size=8)
    first, again, later = (asked(made, "batch-loss", round=r)[0].loss for r in (3, 3, 4))
    assert first == again
    assert first != later
    # It is the mean loss of eight different images: somewhere between the mean of the eight easiest and
    # of the eight hardest, and the answer about all images only where a batch holds them all.
    images, labels = everything(made)
    with torch.no_grad():
        losses, _ = functional.cross_entropy(made.model.eval()(images), labels, reduction="none").sort()
    assert float(losses[:8].mean()) < first < float(losses[-8:].mean())
    whole = call(device(), method="fedavg", model="cnn", batch_size=1000)
    assert asked(whole, "batch-loss")[0].loss == pytest.approx(float(losses.mean()), rel=1e-5)


def test_a_diffusion_loss_is_seeded_by_client_and_round() -> None:
    made = call(device(data="digits:0/96"), method="fedavg", model="unet-tiny", batch_size=32)
    first, again, later = (asked(made, "loss", round=r)[0].loss for r in (3, 3, 4))
    assert first == again
    assert first != later
    # An untrained network predicts noise of variance 1 about as badly as zeros do.
    assert 0.5 < first < 2


def test_accuracy_on_the_clients_own_test_images() -> None:
    made = call(device(data="digits:0/8"), method="fedavg", model="cnn", batch_size=5)
    data = made.device.test_images
    assert data is not None
    labels = torch.from_numpy(np.asarray(data.labels))
    with torch.no_grad():
        logits = made.model.eval()(data.fetch(np.arange(len(data))))
    report, arrays = asked(made, "accuracy")
    assert dict(report.metrics) == {"correct": int((logits.argmax(1) == labels).sum()), "total": len(labels)}
    assert report.loss == pytest.approx(float(functional.cross_entropy(logits, labels)), rel=1e-5)
    assert arrays == {}


def test_accuracy_of_a_device_without_test_images_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = call(device(), method="fedavg", model="cnn")
    monkeypatch.setitem(made.device.__dict__, "test_images", None)
    report, _ = asked(made, "accuracy")
    assert dict(report.metrics) == {"correct": 0, "total": 0}
    assert report.loss == 0


def test_statistics_are_the_means_of_the_batches_statistics() -> None:
    made = call(device(), method="heterofl", model="cnn-bn", batch_size=20)
    layers = {n: m for n, m in made.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert layers
    seen: dict[str, list[Tensor]] = {n: [] for n in layers}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0].detach()))
    images, _ = everything(made)
    batches = [images[i : i + 20] for i in range(0, len(images), 20)]
    made.model.train()
    for batch in batches:
        made.model(batch)
    _, arrays = asked(made, "statistics")
    assert set(arrays) == {f"{n}.{part}" for n in layers for part in ("mean", "var", "count")}
    for name, inputs in seen.items():
        mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
        var = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in inputs]).mean(0)
        np.testing.assert_allclose(arrays[f"{name}.mean"], mean, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(arrays[f"{name}.var"], var, rtol=1e-3, atol=1e-5)
        assert arrays[f"{name}.count"] == len(batches)


def test_samples_are_images_of_the_clients_own_seed() -> None:
    flat: dict[str, Any] = {"method": "fedavg", "model": "unet-tiny", "eval_samples": 10, "sample_steps": 2}
    made = call(device(), **flat)
    # Ten images among a population of four: three each.
    images = asked(made, "samples")[1]["images"]
    assert images.shape == (3, 1, 8, 8)
    assert images.dtype == np.uint8
    assert images.std() > 0
    np.testing.assert_array_equal(asked(made, "samples")[1]["images"], images)
    other = call(device("d"), **flat)
    plan = other.plan(inquiry="samples")
    content = answer(other.device, plan, other.message(plan, control.INQUIRY))
    layouts = answer_layouts("samples", plan.architecture, other.settings, plan.population)
    assert not np.array_equal(payload_of(content, layouts)[SAMPLES].views()["images"], images)
    assert asked(made, "samples", population=100)[1]["images"].shape[0] == 1


@pytest.mark.parametrize("kind", ["loss", "batch-loss", "gradient", "accuracy"])
def test_an_answer_changes_no_state(kind: str, tmp_path: Path) -> None:
    made = call(device(state=tmp_path), method="fedavg", model="cnn-bn", optimizer="adam", local_steps=1)
    plan = made.plan()
    train_round(made.device, plan, made.message(plan, control.TRAIN))
    plan.round, plan.inquiry = 4, kind
    plan.start.CopyFrom(pb.Version(window=1, round=3))
    message = made.message(plan, control.INQUIRY)
    before = [bytes(a.data) for a in message.content.array_records[control.ARRAYS].values()]
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert files
    answer(made.device, plan, message)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files
    assert [bytes(a.data) for a in message.content.array_records[control.ARRAYS].values()] == before


def test_answers_are_finite_and_their_bytes_are_counted() -> None:
    made = call(device(), method="fedavg", model="cnn")
    report, arrays = asked(made, "gradient")
    assert arrays
    assert math.isfinite(report.loss)


@pytest.mark.parametrize(
    ("kind", "changes", "fault"),
    [
        ("weather", {}, "the unknown inquiry 'weather'"),
        ("", {}, "the unknown inquiry ''"),
        ("loss", {"client": "someone"}, "a plan for client 'someone', this is 'c'"),
    ],
)
def test_a_question_that_makes_no_sense_is_the_edges_fault(
    kind: str, changes: dict[str, Any], fault: str
) -> None:
    made = call(device(), method="fedavg", model="cnn")
    plan = made.plan(inquiry=kind, **changes)
    with pytest.raises(WireError, match=f"'edge-1' refused: {fault}"):
        answer(made.device, plan, made.message(plan, control.INQUIRY))
