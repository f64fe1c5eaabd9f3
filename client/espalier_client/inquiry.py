"""Answers inquiries at a client: losses, gradients, accuracy, batch statistics and samples."""

from __future__ import annotations

import numpy as np
import torch
from flwr.app import Message, RecordDict

from espalier.data.imageset import to_uint8
from espalier.errors import WireError
from espalier.methods.views import IMAGES, INQUIRIES, SAMPLES, STATISTICS, answer_layouts
from espalier.models.sampling import sample
from espalier.models.statistics import batch_statistics
from espalier.seeds import rng_for, seed_for
from espalier.tasks.base import base_objective, dataset_gradient, dataset_loss
from espalier.tasks.diffusion_settings import DiffusionSettings
from espalier.training.scoring import accuracy
from espalier.wire.sections import GRADIENT, Payload, SectionId
from espalier_client.augmentation import answer_augmentation
from espalier_client.device import Device
from espalier_client.reply import new_report, pack_reply
from espalier_client.round_privacy import check_plan
from espalier_client.training import Task, arithmetic, read_task, settings_of
from espalier_proto import espalier_pb2 as pb

#: An answer's tensors by section.
Answer = dict[SectionId, dict[str, np.ndarray]]


def answer(device: Device, plan: pb.RoundPlan, message: Message) -> RecordDict:
    """Answer an inquiry about the received network; the device's state does not change.

    ``loss`` is F_k(w) over all of the device's images, ``batch-loss`` over one random mini-batch, ``gradient`` is the
    full-batch gradient, ``accuracy`` counts correct predictions on the device's own test images, and ``statistics``
    are the batch statistics of a network with static batch normalisation (HeteroFL).

    Raises
    ------
    WireError
        If the plan is for another client or invalid, or the inquiry is unknown.
    """
    if plan.inquiry not in INQUIRIES:
        raise WireError(plan.edge, f"the unknown inquiry {plan.inquiry!r}")
    with arithmetic(device, plan):
        if plan.inquiry in ("seeds", "fill"):
            check_plan(device, plan, settings_of(plan))
            return pack_reply(device, plan, *answer_augmentation(device, plan, message))
        return _answer(device, plan, message)


def _answer(device: Device, plan: pb.RoundPlan, message: Message) -> RecordDict:
    task = read_task(device, plan, message)
    report = new_report(device, plan)
    report.metrics.update(task.local.metrics)
    arrays = _ANSWERS[plan.inquiry](device, task, report)
    layouts = answer_layouts(plan.inquiry, plan.architecture, task.local.settings, plan.population)
    return pack_reply(device, plan, report, Payload.fill(layouts, arrays))


def _loss(device: Device, task: Task, report: pb.ClientReport) -> Answer:
    report.loss = _mean_loss(device, task)
    return {}


def _batch_loss(device: Device, task: Task, report: pb.ClientReport) -> Answer:
    local = task.local
    size = min(local.settings.batch_size, len(device.images))
    rng = rng_for(local.settings.seed, device.name, local.round, "batch-loss")
    batch = np.sort(rng.choice(len(device.images), size, replace=False))
    report.loss = _mean_loss(device, task, batch)
    return {}


def _mean_loss(device: Device, task: Task, indices: np.ndarray | None = None) -> float:
    settings, target = task.local.settings, device.torch_device
    images = device.images if indices is None else device.images.subset(indices)
    objective = base_objective(settings)
    objective.begin(task.model.to(target), task.local)
    return dataset_loss(task.model, objective, images, target, settings.batch_size, _generator(device, task))


def _gradient(device: Device, task: Task, report: pb.ClientReport) -> Answer:
    settings, target = task.local.settings, device.torch_device
    objective = base_objective(settings)
    objective.begin(task.model.to(target), task.local)
    gradient = dataset_gradient(
        task.model, objective, device.images, target, settings.batch_size, _generator(device, task)
    )
    return {GRADIENT: gradient}


def _accuracy(device: Device, task: Task, report: pb.ClientReport) -> Answer:
    images = device.test_images
    if images is None or not len(images):
        report.metrics.update({"correct": 0, "total": 0})
        return {}
    model = task.method.predictor(task.model, len(device.images.classes)).to(device.torch_device)
    correct, total, loss = accuracy(model, images, device.torch_device, task.local.settings.batch_size)
    report.metrics.update({"correct": correct, "total": total})
    report.loss = loss / max(total, 1)
    return {}


def _statistics(device: Device, task: Task, report: pb.ClientReport) -> Answer:
    size = task.local.settings.batch_size
    starts = range(0, len(device.images), size)
    batches = (
        device.images.fetch(np.arange(s, min(s + size, len(device.images)))).to(device.torch_device)
        for s in starts
    )
    found = batch_statistics(task.model.to(device.torch_device), batches)
    arrays: dict[str, np.ndarray] = {}
    for path, (mean, variance, count) in found.items():
        parts = {"mean": mean, "var": variance, "count": count}
        arrays |= {f"{path}.{k}": np.asarray(v, np.float32) for k, v in parts.items()}
    return {STATISTICS: arrays}


def _samples(device: Device, task: Task, report: pb.ClientReport) -> Answer:
    local = task.local
    layouts = answer_layouts("samples", task.plan.architecture, local.settings, task.plan.population)
    settings = local.settings.of(DiffusionSettings)
    images = sample(
        task.model.to(device.torch_device),
        count=layouts[SAMPLES].tensors[0].shape[0],
        steps=settings.sample_steps,
        seed=seed_for(local.settings.seed, device.name, 0, "evaluation"),
        settings=settings,
    )
    return {SAMPLES: {IMAGES: to_uint8(images).numpy()}}


_ANSWERS = {
    "samples": _samples,
    "loss": _loss,
    "batch-loss": _batch_loss,
    "gradient": _gradient,
    "accuracy": _accuracy,
    "statistics": _statistics,
}


def _generator(device: Device, task: Task) -> torch.Generator:
    seed = seed_for(task.local.settings.seed, device.name, task.local.round, f"inquiry {task.plan.inquiry}")
    return torch.Generator(device=device.torch_device).manual_seed(seed)
