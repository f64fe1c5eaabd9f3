"""FAug at a client: uploads seed images, and generates images of the labels that the client lacks."""

from __future__ import annotations

import numpy as np
from flwr.app import Message

from espalier.config.run_settings import RunSettings
from espalier.data.imageset import to_uint8
from espalier.errors import WireError
from espalier.generators.conditional import ConditionalGenerator
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
    """Answer FAug's inquiries: "seeds", and "fill", whose payload has the generator's tensors.

    Raises
    ------
    WireError
        If the plan is for another client, or its settings or generator are invalid.
    """
    check_address(device, plan)
    settings = settings_of(plan)
    report = new_report(device, plan)
    if plan.inquiry == "seeds":
        return report, _seeds(device, settings, report)
    return report, _fill(device, settings, plan, message, report)


def _seeds(device: Device, settings: RunSettings, report: pb.ClientReport) -> Payload:
    """Return some images of the client's scarce labels, and of other labels so that servers cannot tell which."""
    rng = rng_for(settings.seed, device.name, 0, "seed images")
    wanted, redundant = seed_labels(device.labels, settings, rng)
    chosen = []
    for label in sorted([*wanted, *redundant]):
        own = np.flatnonzero(device.images.labels == label)
        chosen.append(np.sort(rng.permutation(own)[: settings.of(FAugSettings).faug_seeds]))
    indices = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
    images = to_uint8(device.images.fetch(indices)).numpy() if len(indices) else _no_images(device)
    report.metrics.update({"seeds": len(indices), "targets": len(wanted), "redundant": len(redundant)})
    labels = device.images.labels[indices].astype(np.int64)
    return Payload.pack({SEEDS: {SEED_IMAGES: images, SEED_LABELS: labels}})


def _no_images(device: Device) -> np.ndarray:
    return np.zeros((0, *device.images.shape), np.uint8)


def _fill(
    device: Device, settings: RunSettings, plan: pb.RoundPlan, message: Message, report: pb.ClientReport
) -> Payload:
    """Generate images of the scarce labels until the client has as many of them as of the others."""
    arrays = read_downlink(message, plan, settings, plan.edge).views().get(GENERATOR, {})
    try:
        generator = ConditionalGenerator.of(arrays, len(device.images.classes), device.images.shape)
    except ValueError as error:
        raise WireError(plan.edge, str(error)) from error
    missing = targets(device.labels, settings.of(FAugSettings).faug_scarce)
    labels = np.repeat(np.arange(len(missing)), missing).astype(np.int64)
    if len(labels):
        seed = seed_for(settings.seed, device.name, 0, "fill")
        device.store_generated(plan.run, to_uint8(generator.draw(labels, seed)).numpy(), labels)
    report.metrics["filled"] = len(labels)
    return Payload({})
