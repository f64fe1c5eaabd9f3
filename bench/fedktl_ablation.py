"""An ablation of FedKTL's image-vector pairs, with one client of two shots: without pairs, or with real images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np

from bench.cells import Cell, Measured, Setup, cell_environment, run_cell
from bench.claims import Values, accuracies
from bench.knowledge_setup import AS_AUTHORS, HEAVY, Generators, alone, cloud_edge_cells
from bench.report import Row, Target

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from espalier.data.imageset import ImageSet
    from espalier.generators.base import Generator
    from espalier_server.run import TreeRun

SHOTS = 2
#: Label -> settings in addition to those of FedKTL's cells.
MU0, CLIPPED, ORACLE = "FedKTL, mu=0", "FedKTL, mu=0, clip-norm=1", "FedKTL, pairs of real images"
VARIANTS: Mapping[str, Values] = {
    MU0: {},
    CLIPPED: {"clip-norm": 1.0},
    "FedKTL": {},
    "FedKTL, clip-norm=1": {"clip-norm": 1.0},
    AS_AUTHORS: {"transfer-weight": HEAVY},
    ORACLE: {},
}
#: Training steps and batch size of the classifier that judges images; on MNIST it reaches 97 %.
JUDGE_STEPS, JUDGE_BATCH = 400, 64


@dataclass(frozen=True)
class Pairs:
    """Statistics of the last round's pairs.

    Attributes
    ----------
    latent, centroid : float
        Mean square of the elements of the generator's latents, and of the centroids.
    apart : float
        Mean distance between centroids, relative to that between latents of the generator.
    images_apart : float
        The same for their images.
    shown : float
        Share of the images that the judge assigns to the class that they represent.
    """

    latent: float
    centroid: float
    apart: float
    images_apart: float
    shown: float


class RealImages:
    """An oracle in place of the generator F: for class c it returns a real image of class c.

    Parameters
    ----------
    generator : Generator
        The generator whose latents are used.
    data : ImageSet
        The data set of the real images.
    seed : int
        Seed of the choice of images, which differs in each round.
    """

    def __init__(self, generator: Generator, data: ImageSet, seed: int) -> None:
        self.generator, self.data = generator, data
        self.latent_dim = generator.latent_dim
        self._order = np.random.default_rng(seed)

    def sample_latents(self, count: int, rng: torch.Generator) -> Tensor:
        """Return latents of the generator."""
        return self.generator.sample_latents(count, rng)

    def synthesise(self, latents: Tensor, size: int, channels: int) -> Tensor:
        """Return a real image for each class 0, 1, … up to the number of latents."""
        labels = np.asarray(self.data.labels)
        chosen = [self._order.choice(np.flatnonzero(labels == label)) for label in range(len(latents))]
        return self.data.fetch(np.array(chosen))


@dataclass
class Ablation:
    """Results of the variants by label: the runs of their seeds and their last pairs; the judge's accuracy."""

    runs: dict[str, list[Measured]] = field(default_factory=dict)
    pairs: dict[str, list[Pairs]] = field(default_factory=dict)
    judge: float = 0.0


def measure(setup: Setup, generators: Generators, more: Values, root: Path, judge_steps: int) -> Ablation:
    """Run every variant with every seed; `more` adds settings to all."""
    from espalier.data.spec import open_data
    from espalier.generators.base import open_generator

    base = cloud_edge_cells(setup, generators, more, [SHOTS])
    data = open_data(setup.data, root=root)
    generator = open_generator(f"gan:{generators.trained}", device="cpu")
    judge, accuracy = train_judge(data, open_data(setup.data, root=root, split="test"), judge_steps)
    found = Ablation(judge=accuracy)
    with cell_environment(root):
        for label, settings in VARIANTS.items():
            base_label = MU0 if label.startswith(MU0) else "FedKTL"
            found.runs[label], found.pairs[label] = [], []
            for cell in base[SHOTS, base_label]:
                variant = Cell(alone(setup), cell.scheme, {**cell.settings, **settings}, cell.seed)

                def collect_pairs(run: TreeRun, label: str = label) -> None:
                    found.pairs[label] += last_pairs(run, generator, judge)

                opened = RealImages(generator, data, cell.seed) if label == ORACLE else generator
                with patch("espalier.methods.fedktl.method.open_generator", return_value=opened):
                    found.runs[label].append(run_cell(variant, collect_pairs))
    return found


def last_pairs(run: TreeRun, generator: Generator, judge: nn.Module) -> list[Pairs]:
    """Return the statistics of a run's last pairs; empty if there were none."""
    import torch

    from espalier.wire import pairs as wire

    assert run.state is not None
    arrays = run.state.section(wire.PAIRS)
    channels, size, _ = run.method.image_shape
    received = wire.Pairs.received(arrays, (channels, size, size), "cloud")
    if received is None:
        return []
    images, centroids = (torch.from_numpy(np.array(a)) for a in (received.floats(), received.centroids))
    latents = generator.sample_latents(200, torch.Generator().manual_seed(0))
    drawn = generator.synthesise(latents, size, channels)
    with torch.no_grad():
        predicted = judge(images).argmax(1)
    return [
        Pairs(
            float(latents.square().mean()),
            float(centroids.square().mean()),
            _mean_distance(centroids) / _mean_distance(latents),
            _mean_distance(images) / _mean_distance(drawn),
            float((predicted == torch.arange(len(predicted))).float().mean()),
        )
    ]


def train_judge(data: ImageSet, test: ImageSet, steps: int) -> tuple[nn.Module, float]:
    """Train a small classifier; return it with its accuracy on the test split."""
    import torch
    from torch.nn import functional

    from espalier.methods.run_config import RunConfig
    from espalier.models.initial import initial_model

    settings = RunConfig.from_flat({"method": "fedavg", "model": "cnn", "seed": 0})
    network = initial_model(settings, data.shape, len(data.classes)).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    order, labels = np.random.default_rng(0), np.asarray(data.labels)
    for _ in range(steps):
        chosen = order.integers(len(data), size=JUDGE_BATCH)
        loss = functional.cross_entropy(network(data.fetch(chosen)), torch.from_numpy(labels[chosen]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    network.eval()
    chosen = order.permutation(len(test))[:2000]
    with torch.no_grad():
        right = network(test.fetch(chosen)).argmax(1).numpy() == np.asarray(test.labels)[chosen]
    return network, float(right.mean())


def rows(found: Ablation) -> list[Row]:
    """Return a row for each variant; accuracies in per cent."""

    def of(pairs: Sequence[Pairs], name: str, digits: int = 2) -> float | None:
        return round(mean(getattr(p, name) for p in pairs), digits) if pairs else None

    return [
        {
            "part": f"transfer, {SHOTS} shots",
            "method": label,
            "seeds": len(runs),
            "clients": round(accuracies(runs, "mean"), 1),
            "best": round(accuracies(runs, "mean", best=True), 1),
            "by_seed": " ".join(f"{100 * (m.last.mean or 0.0):.1f}" for m in runs),
            "latent_square": of(found.pairs.get(label, []), "latent"),
            "centroid_square": of(found.pairs.get(label, []), "centroid"),
            "centroids_apart": of(found.pairs.get(label, []), "apart"),
            "images_apart": of(found.pairs.get(label, []), "images_apart"),
            "class_shown": of(found.pairs.get(label, []), "shown"),
            "status": "; ".join(sorted({m.status for m in runs})),
        }
        for label, runs in found.runs.items()
    ]


def targets(found: Ablation) -> list[Target]:
    """Return targets: the gain of the authors' clip-norm, and the gain of pairs of real images."""
    judged = []
    for name, better, base in (
        ("the authors' clip-norm=100 over 1, without pairs", MU0, CLIPPED),
        ("pairs of real images over no pairs", ORACLE, MU0),
    ):
        value = accuracies(found.runs[better], "mean") - accuracies(found.runs[base], "mean")
        judged.append(Target(f"transfer: {name}, points, above 0", value, 0.0, value > 0))
    return judged


def notes(found: Ablation) -> list[str]:
    """Return the explanation of the columns."""
    return [
        "transfer: latent_square and centroid_square are mean squares of the generator's latents and of the last "
        "round's centroids; centroids_apart and images_apart are mean distances between centroids and between their "
        "images, relative to random ones; class_shown is the share of images that a classifier (accuracy "
        f"{100 * found.judge:.1f} % on the test split) assigns to the class that they represent",
    ]


def _mean_distance(values: Tensor) -> float:
    import torch

    flat = values.flatten(1)
    return float(torch.pdist(flat).mean())
