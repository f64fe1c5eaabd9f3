"""A made-up run, as realistic as a fixture can be: the report's tests and its looks are tried on it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from espalier.methods.own_models import OwnModelSettings
from espalier.methods.run_config import RunConfig
from espalier_server.records.record import (
    AccuracyEntry,
    AugmentationEntry,
    ClientEntry,
    Evaluation,
    FaultEntry,
    ModelScore,
    ModelSize,
    Participation,
    RoundEntry,
    RunRecord,
    Scores,
    SelectionEntry,
    Traffic,
    WindowEntry,
)

EDGES = ["edge-1", "edge-2"]
MODEL_BYTES = 4_100_000


def made_up_record(windows: int = 12, rg: int = 5, prune_at: int = 4) -> RunRecord:
    """Return the record of a finished FedPhD run with a straggler and a refused update."""
    rng = np.random.default_rng(7)
    config = RunConfig(
        rounds=windows * rg, rg=rg, prune_at=prune_at * rg, eval_data="digits", run_id="made-up"
    )
    labels = {f"client-{i + 1}": rng.multinomial(360, rng.dirichlet(np.full(10, 0.4))) for i in range(4)}
    record = RunRecord(
        espalier="0.1.0",
        run="fedphd-1a2b3c4d",
        status="finished",
        started="2026-05-04T09:30:00+00:00",
        seconds=312.4,
        method="fedphd",
        config=config.to_flat(),
        classes=[str(i) for i in range(10)],
        edges=EDGES,
        clients={
            name: ClientEntry(
                samples=360, edges=EDGES, labels=[float(n) for n in counts], data="digits", device="cpu"
            )
            for name, counts in labels.items()
        },
        model=ModelSize(
            params=672_113,
            macs=11_480_000,
            params_dense=1_034_881,
            macs_dense=17_920_000,
            pruned_at_window=prune_at,
            pruned_at_round=prune_at * rg,
        ),
    )
    totals = {"client-edge": Traffic(), "edge-cloud": Traffic()}
    for window in range(1, windows + 1):
        entry = _window(window, rg, window > prune_at, labels, rng)
        record.windows.append(entry)
        for link, traffic in entry.links.items():
            totals[link].up_bytes += traffic.up_bytes
            totals[link].down_bytes += traffic.down_bytes
            totals[link].messages += traffic.messages
        record.quality.append(_evaluation(window, rg, window == prune_at + 1, rng))
    record.links = totals
    late = "no reply within 600 s"
    record.faults = [
        FaultEntry(tier="edge", node="client-3", kind="straggler", detail=late, window=3, round=14),
        FaultEntry(
            tier="edge",
            node="client-2",
            kind="refused",
            detail="tensor <mid.w> holds NaN",
            window=7,
            round=33,
        ),
    ]
    return record


def made_up_classifier(windows: int = 12, rg: int = 5, clients: int = 20, models: int = 2) -> RunRecord:
    """Return the record of a finished run of two clusters of classifiers, chosen by their losses."""
    rng = np.random.default_rng(11)
    record = made_up_record(windows, rg)
    config = RunConfig(method="fedavg", model="cnn", rounds=windows * rg, rg=rg, eval_data="digits")
    record.config, record.method, record.quality = config.to_flat(), "ifca", []
    record.model = ModelSize(params=41_210, macs=602_000, params_dense=41_210, macs_dense=602_000)
    names = [f"client-{i + 1:02d}" for i in range(clients)]
    record.clients = {
        name: ClientEntry(
            samples=int(rng.integers(40, 110)),
            edges=EDGES,
            labels=rng.multinomial(72, rng.dirichlet(np.full(10, 0.4))).astype(float).tolist(),
            data="digits",
            device="cpu",
        )
        for name in names
    }
    skill = rng.normal(0, 0.07, clients)
    for entry in record.windows:
        grown = 1 - 0.85 * math.exp(-entry.window / 3)
        entry.assignments = {
            name: f"cluster {int((i + (entry.window < 3 and rng.random() < 0.4)) % models)}"
            for i, name in enumerate(names)
        }
        for round_ in entry.rounds:
            asked = sorted(rng.choice(names, size=10, replace=False).tolist())
            losses = {name: float(2.3 * math.exp(-round_.round / 14) + rng.gamma(2, 0.08)) for name in asked}
            picked = sorted(asked, key=losses.__getitem__)[-5:]
            round_.selection = SelectionEntry(
                rule="pow-d", candidates=asked, scores=dict(losses), picked=picked
            )
            round_.participants = [Participation(client=n, edge=EDGES[i % 2]) for i, n in enumerate(picked)]
        classes = np.clip(grown - 0.05 + rng.normal(0, 0.03, (models, 10)), 0, 1)
        record.accuracy.append(
            AccuracyEntry(
                window=entry.window,
                round=entry.rounds[-1].round,
                models={
                    f"cluster {m}": ModelScore(
                        accuracy=float(classes[m].mean()),
                        loss=2.3 * math.exp(-entry.window / 3) + 0.1 + 0.05 * m,
                        classes=classes[m].tolist(),
                    )
                    for m in range(models)
                },
                clients=dict(zip(names, np.clip(grown - 0.08 + skill, 0, 1).tolist(), strict=True)),
                samples=360,
                seconds=0.2,
            )
        )
    return record


def made_up_exchange(windows: int = 12, clients: int = 12) -> RunRecord:
    """Return the record of a finished FedKTL run of three models, behind FAug."""
    rng = np.random.default_rng(13)
    record = made_up_classifier(windows, 1, clients)
    config = RunConfig(
        method="fedktl",
        model="cnn4",
        families="cnn4,resnet4,resnet10",
        augment="faug",
        generator="gan:gan",
        rounds=windows,
    )
    record.config, record.method, record.model = config.to_flat(), "fedktl", ModelSize()
    names, models = sorted(record.clients), config.of(OwnModelSettings).families.split(",")
    for window, entry in zip(record.windows, record.accuracy, strict=True):
        window.assignments = {name: models[i % 3] for i, name in enumerate(names)}
        window.metrics = {
            "alignment-mmd": 0.9 * math.exp(-window.window / 3) + 0.05,
            "alignment-mse": 0.02 * math.exp(-window.window / 4) + 0.003,
        }
        if window.window > 1:
            window.metrics["transfer-loss"] = 0.4 * math.exp(-window.window / 5) + 0.02
        window.links["edge-cloud"] = Traffic(up_bytes=4_800, down_bytes=143_360, messages=4)
        entry.models, entry.samples = {}, 0
        entry.clients = {n: (a or 0) * (1 - 0.06 * (i % 3)) for i, (n, a) in enumerate(entry.clients.items())}
    record.augmentation = AugmentationEntry(
        seeds={name: 5 * int(rng.integers(1, 5)) for name in names},
        filled={name: int(rng.integers(20, 160)) for name in names},
        leakage_to_server=dict.fromkeys(names, 0.75),
        leakage_between=dict.fromkeys(names, 0.3),
        parameters=740_000,
        links={"client-edge": Traffic(up_bytes=66_000, down_bytes=35_520_000, messages=48)},
    )
    return record


def _window(
    window: int, rg: int, pruned: bool, labels: dict[str, np.ndarray], rng: np.random.Generator
) -> WindowEntry:
    rounds, counts = [], {edge: np.zeros(10) for edge in EDGES}
    for round_ in range((window - 1) * rg + 1, window * rg + 1):
        parts = [Participation(client=name, edge=EDGES[int(rng.random() < 0.5)]) for name in labels]
        for part in parts:
            counts[part.edge] += labels[part.client]
        loss = (
            0.9 * math.exp(-round_ / 6)
            + 0.09
            + 0.02 * pruned * math.exp(-(window - 5))
            + rng.normal() * 0.006
        )
        rounds.append(RoundEntry(round=round_, loss=loss, participants=parts, samples=1440, seconds=3.1))
    size = MODEL_BYTES * (0.65 if pruned else 1.0)
    share = rng.uniform(0.4, 0.6)
    mu = rng.uniform(0.86, 0.97, size=2)
    return WindowEntry(
        window=window,
        rounds=rounds,
        rho={"edge-1": share, "edge-2": 1 - share},
        mu=dict(zip(EDGES, mu.tolist(), strict=True)),
        mu_planned=float(mu.mean()),
        mu_random=float(mu.mean() - rng.uniform(0.05, 0.14)),
        samples={edge: int(counts[edge].sum()) for edge in EDGES},
        labels={edge: counts[edge].tolist() for edge in EDGES},
        links={
            "client-edge": Traffic(up_bytes=int(20 * size), down_bytes=int(20 * size), messages=20),
            "edge-cloud": Traffic(up_bytes=int(2 * size), down_bytes=int(2 * size), messages=2),
        },
        timings={"train": 19 + rng.normal(), "evaluate": 3.5 + rng.random(), "checkpoint": 0.3},
    )


def _evaluation(window: int, rg: int, dented: bool, rng: np.random.Generator) -> Evaluation:
    frechet = 160 * math.exp(-window / 2.2) + 5 + 6 * dented + rng.random()
    return Evaluation(
        window=window,
        round=window * rg,
        samples=500,
        features="digits",
        frechet=frechet,
        inception_score=1 + 8.1 * (1 - math.exp(-window / 2.5)),
        kid=frechet / 900,
        floor=Scores(frechet=1.6, inception_score=9.4, kid=0.0004),
        noise=Scores(frechet=214.0, inception_score=1.4, kid=0.31),
        gaussian=Scores(frechet=38.0, inception_score=4.4, kid=0.044),
        seconds=3.6,
    )


def draw_samples(folder: Path, windows: int = 12) -> None:
    """Write sample grids that get sharper: 8x8 digits between noise and data."""
    from sklearn.datasets import load_digits

    digits = load_digits().images[:64] / 16.0
    rng = np.random.default_rng(3)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for window in range(1, windows + 1):
        clear = min(1.0, window / 9)
        images = clear * digits + (1 - clear) * rng.random(digits.shape)
        grid = images.reshape(8, 8, 8, 8).transpose(0, 2, 1, 3).reshape(64, 64)
        picture = Image.fromarray((255 * grid).clip(0, 255).astype(np.uint8)).resize(
            (256, 256), Image.Resampling.NEAREST
        )
        picture.save(folder / "samples" / f"window-{window:04d}.png")
