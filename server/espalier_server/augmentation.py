"""FAug at the cloud (Jeong et al. 2018): a conditional GAN is trained on the clients' seed images before round 1."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from espalier.config.run_settings import RunSettings
from espalier.methods.faug import GENERATOR, SEED_IMAGES, SEED_LABELS, FAugSettings, leakage
from espalier.methods.selection import Answer
from espalier.seeds import seed_for
from espalier.wire.sections import Payload
from espalier_proto import espalier_pb2 as pb
from espalier_server.evaluation.image_grid import image_grid
from espalier_server.generators.conditional_training import train_conditional
from espalier_server.records.record import AugmentationEntry
from espalier_server.window_aggregator import WindowAggregator

if TYPE_CHECKING:
    import torch

log = logging.getLogger("espalier.cloud")


def augment(
    settings: RunSettings, strategy: WindowAggregator, classes: int, device: torch.device, samples: Path
) -> AugmentationEntry:
    """Train a generator on the clients' seed images and let clients generate images of the labels that they lack.

    Parameters
    ----------
    settings : RunSettings
        The `faug-…` settings.
    strategy : WindowAggregator
        Sends inquiries to the clients.
    classes : int
        Number of classes.
    device : torch.device
        Where the GAN is trained.
    samples : Path
        File for a grid of generated images.

    Returns
    -------
    AugmentationEntry
        Seed images, generated images and both privacy leakages by client.
    """
    no_network = pb.ArchitectureSpec()
    seeds = _valid_seeds(strategy.ask("seeds", no_network, Payload({})), classes, strategy)
    entry = AugmentationEntry()
    pixels = [a.arrays[SEED_IMAGES] for a in seeds.values()]
    parts = [a.arrays[SEED_LABELS] for a in seeds.values()]
    labels = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    if not len(labels):
        log.warning("no client lacks a label of which it has a seed; no images are generated")
        return entry
    uploaded = len(np.unique(labels))
    for name, answer in sorted(seeds.items()):
        wanted, redundant = (int(answer.metrics.get(k, 0)) for k in ("targets", "redundant"))
        to_server, between = leakage(wanted, redundant, uploaded)
        entry.seeds[name] = int(answer.metrics.get("seeds", 0))
        entry.leakage_to_server[name], entry.leakage_between[name] = to_server, between
    seed = seed_for(settings.seed, "cloud", 0, "conditional gan")
    generator = train_conditional(
        np.concatenate(pixels),
        labels,
        classes,
        steps=settings.of(FAugSettings).faug_steps,
        seed=seed,
        device=device,
    )
    samples.parent.mkdir(parents=True, exist_ok=True)
    image_grid(generator.draw(np.repeat(np.arange(classes), 8), seed)).save(samples)
    entry.parameters = sum(p.numel() for p in generator.parameters())
    filled = strategy.ask("fill", no_network, Payload.pack({GENERATOR: generator.arrays()}))
    entry.filled = {n: int(a.metrics.get("filled", 0)) for n, a in sorted(filled.items())}
    return entry


def _valid_seeds(seeds: dict[str, Answer], classes: int, strategy: WindowAggregator) -> dict[str, Answer]:
    """Return the clients' seeds; those with a label that does not exist are recorded as faults and left out."""
    valid = {}
    for name, answer in sorted(seeds.items()):
        labels = answer.arrays[SEED_LABELS]
        if (wrong := labels[(labels < 0) | (labels >= classes)]).size:
            detail = f"a seed image of label {wrong[0]}, but there are {classes} classes"
            strategy.outcome.faults.append(pb.Fault(tier="cloud", node=name, kind="refused", detail=detail))
            log.warning("%s refused: %s", name, detail)
            continue
        valid[name] = answer
    return valid
