"""FAug at the cloud: seeds in, a conditional GAN trained, the generator out to be used before any training."""

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
from espalier_server.records.record import AugmentationEntry
from espalier_server.window_aggregator import WindowAggregator

if TYPE_CHECKING:
    import torch

log = logging.getLogger("espalier.cloud")


def augment(
    settings: RunSettings, strategy: WindowAggregator, classes: int, device: torch.device, samples: Path
) -> AugmentationEntry:
    """Let clients fill up the labels they lack.

    Parameters
    ----------
    settings : RunSettings
        The `faug-…` settings.
    strategy : WindowAggregator
        Asks the clients.
    classes : int
        Number of classes.
    device : torch.device
        Where the GAN is trained.
    samples : Path
        Where a grid of its images goes.

    Returns
    -------
    AugmentationEntry
        Who uploaded and filled how much, and both privacy leakages by client.
    """
    from espalier_server.generators.conditional_training import train_conditional

    nothing = pb.ArchitectureSpec()
    seeds = _sound(strategy.ask("seeds", nothing, Payload({})), classes, strategy)
    entry = AugmentationEntry()
    pixels = [a.arrays[SEED_IMAGES] for a in seeds.values()]
    labels = [a.arrays[SEED_LABELS] for a in seeds.values()]
    marks = np.concatenate(labels) if labels else np.zeros(0, np.int64)
    if not len(marks):
        log.warning("no client lacks a label of which it has a seed; nothing is filled up")
        return entry
    uploaded = len(np.unique(marks))
    for name, answer in sorted(seeds.items()):
        wanted, redundant = (int(answer.metrics.get(k, 0)) for k in ("targets", "redundant"))
        to_server, between = leakage(wanted, redundant, uploaded)
        entry.seeds[name] = int(answer.metrics.get("seeds", 0))
        entry.leakage_to_server[name], entry.leakage_between[name] = to_server, between
    seed = seed_for(settings.seed, "cloud", 0, "conditional gan")
    generator = train_conditional(
        np.concatenate(pixels),
        marks,
        classes,
        steps=settings.of(FAugSettings).faug_steps,
        seed=seed,
        device=device,
    )
    samples.parent.mkdir(parents=True, exist_ok=True)
    image_grid(generator.draw(np.repeat(np.arange(classes), 8), seed)).save(samples)
    entry.parameters = sum(p.numel() for p in generator.parameters())
    filled = strategy.ask("fill", nothing, Payload.pack({GENERATOR: generator.arrays()}))
    entry.filled = {n: int(a.metrics.get("filled", 0)) for n, a in sorted(filled.items())}
    return entry


def _sound(seeds: dict[str, Answer], classes: int, strategy: WindowAggregator) -> dict[str, Answer]:
    """Return the clients' seeds without those of classes that do not exist, whose senders are named."""
    sound = {}
    for name, answer in sorted(seeds.items()):
        marks = answer.arrays[SEED_LABELS]
        if (wrong := marks[(marks < 0) | (marks >= classes)]).size:
            detail = f"a seed image of label {wrong[0]}, there are {classes} classes"
            strategy.outcome.faults.append(pb.Fault(tier="cloud", node=name, kind="refused", detail=detail))
            log.warning("%s refused: %s", name, detail)
            continue
        sound[name] = answer
    return sound
