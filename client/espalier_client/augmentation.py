"""FAug at a client: what it uploads as seeds, and how it fills up the labels it lacks."""

from __future__ import annotations

import numpy as np
from flwr.app import Message

from espalier.config.run_settings import RunSettings
from espalier.data.imageset import to_uint8
from espalier.errors import WireError
from espalier.methods.faug import (
    GENERATOR,
    SEED_IMAGES,
    SEED_LABELS,
    SEEDS,
    FAugSettings,
    seed_labels,
    targets,
)
from espalier.seeds import rng_for, seed_for
from espalier.wire.downlink import read_downlink
from espalier.wire.sections import Payload
from espalier_client.device import Device
from espalier_client.reply import new_report
from espalier_client.training import check_address, settings_of
from espalier_proto import espalier_pb2 as pb


def answer_augmentation(
    device: Device, plan: pb.RoundPlan, message: Message
) -> tuple[pb.ClientReport, Payload]:
    """Answer FAug's two inquiries: "seeds", and "fill" with the generator's tensors in the payload.

    Raises
    ------
    WireError
        If the plan is another client's, or its settings or generator do not fit.
    """
    check_address(device, plan)
    settings = settings_of(plan)
    report = new_report(device, plan)
    if plan.inquiry == "seeds":
        return report, _seeds(device, settings, report)
    return report, _fill(device, settings, plan, message, report)


def _seeds(device: Device, settings: RunSettings, report: pb.ClientReport) -> Payload:
    """Return a few images of the labels this client lacks, and of some it does not, to hide which."""
    rng = rng_for(settings.seed, device.name, 0, "seed images")
    wanted, redundant = seed_labels(device.labels, settings, rng)
    chosen = []
    for label in sorted([*wanted, *redundant]):
        own = np.flatnonzero(device.images.labels == label)
        chosen.append(np.sort(rng.permutation(own)[: settings.of(FAugSettings).faug_seeds]))
    indices = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
    images = to_uint8(device.images.fetch(indices)).numpy() if len(indices) else _nothing(device)
    report.metrics.update({"seeds": len(indices), "targets": len(wanted), "redundant": len(redundant)})
    labels = device.images.labels[indices].astype(np.int64)
    return Payload.pack({SEEDS: {SEED_IMAGES: images, SEED_LABELS: labels}})


def _nothing(device: Device) -> np.ndarray:
    return np.zeros((0, *device.images.shape), np.uint8)


def _fill(
    device: Device, settings: RunSettings, plan: pb.RoundPlan, message: Message, report: pb.ClientReport
) -> Payload:
    """Draw images of the labels this client lacks until it has as many as of the others."""
    from espalier.generators.conditional import ConditionalGenerator

    arrays = read_downlink(message, plan, settings, plan.edge).views().get(GENERATOR, {})
    try:
        generator = ConditionalGenerator.of(arrays, len(device.images.classes), device.images.shape)
    except ValueError as error:
        raise WireError(plan.edge, str(error)) from error
    missing = targets(device.labels, settings.of(FAugSettings).faug_scarce)
    labels = np.repeat(np.arange(len(missing)), missing).astype(np.int64)
    if len(labels):
        seed = seed_for(settings.seed, device.name, 0, "fill")
        device.keep_filled(plan.run, to_uint8(generator.draw(labels, seed)).numpy(), labels)
    report.metrics["filled"] = len(labels)
    return Payload({})
