"""Runs of diffusion methods on a tree in one process, and the settings that the benches of them share."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image

from bench.local_tree import LocalClient, LocalTree
from espalier.config.fields import FlatValue
from espalier.errors import EspalierError
from espalier.methods.run_config import with_defaults
from espalier.wire.traffic import LINKS
from espalier_server.records.events import EVENTS_FILE
from espalier_server.records.record import Evaluation, RunRecord

#: Local epochs of the paper's baselines, and FedPhD's edge rounds in a window.
EPOCHS = WINDOW = 5
#: Clients per round, as in the paper.
PER_ROUND = 4
#: Number of evaluations of a run.
POINTS = 3

Settings = Mapping[str, FlatValue]

#: Settings of all runs of a model.
REGIMES: Mapping[str, Settings] = {
    "unet-tiny": {
        "learning-rate": 0.002,
        "batch-size": 16,
        "warmup-steps": 20,
        "eval-samples": 256,
        "sample-steps": 20,
        "pruning-ratio": 0.25,
    },
    "unet-small": {
        "learning-rate": 0.001,
        "batch-size": 32,
        "flip": True,
        "eval-samples": 1000,
        "pruning-ratio": 0.2,
    },
    # The authors' code; their Inception-v3 features are `--features inception`.
    "unet-paper": {
        "learning-rate": 0.0002,
        "batch-size": 128,
        "warmup-steps": 100,
        "flip": True,
        "eval-samples": 10000,
        "sample-steps": 100,
        "pruning-ratio": 0.2,
    },
}
#: Data set -> model.
MODELS = {"digits": "unet-tiny", "cifar10": "unet-paper", "celeba": "unet-paper"}
TINY: Settings = {"local-steps": 1, "batch-size": 4, "eval-samples": 8, "sample-steps": 2}


class RunFailedError(EspalierError):
    """A run of the comparison that failed or was not evaluated."""


@dataclass(frozen=True)
class Entry:
    """A row of the table: a method as the paper ran it.

    Attributes
    ----------
    name : str
        Name of the row.
    epochs : int
        Local epochs E; a run has rounds / E rounds.
    paper : float or None
        The paper's FID on CIFAR-10, 2 classes a client.
    settings : Mapping
        Settings that differ from the other rows.
    """

    name: str
    epochs: int
    paper: float | None
    settings: Settings = field(default_factory=dict)


@dataclass
class Measured:
    """Result of a run.

    Attributes
    ----------
    record : RunRecord
        The run's record.
    sent : dict[int, dict[str, int]]
        Cumulative payload bytes of training by window and link, both directions.
    grid : np.ndarray
        The last sample grid, uint8 [H, W] or [H, W, 3].
    """

    record: RunRecord
    sent: dict[int, dict[str, int]]
    grid: np.ndarray

    @property
    def bytes(self) -> dict[str, int]:
        """Payload bytes of training by link, both directions."""
        return self.sent[max(self.sent)]

    @property
    def last(self) -> Evaluation:
        """The last evaluation."""
        return self.record.quality[-1]

    @property
    def frechet(self) -> float:
        """The last Fréchet distance."""
        return math.nan if self.last.frechet is None else self.last.frechet

    @property
    def seconds(self) -> float:
        """Seconds of all windows, without evaluation."""
        return sum(w.timings["train"] for w in self.record.windows)


@dataclass(frozen=True)
class Comparison:
    """The set-up that all rows share.

    Attributes
    ----------
    data : str
        NAME or FOLDER of the data.
    clients, edges : int
        Size of the tree.
    rounds : int
        Rounds at E=1, a multiple of 5.
    base : Mapping
        Settings of every run.
    folder : Path
        Folder for runs.
    """

    data: str
    clients: int
    edges: int
    rounds: int
    base: Settings
    folder: Path

    @property
    def passes(self) -> float:
        """Mean passes over a client's data."""
        return self.rounds * min(PER_ROUND, self.clients) / self.clients

    def run(self, entry: Entry, seed: int = 0, more: Settings = MappingProxyType({})) -> Measured:
        """Run a row.

        Parameters
        ----------
        entry : Entry
            The row.
        seed : int
            Index of the repetition, from 0; it seeds the run and the partition.
        more : Mapping
            Additional settings.

        Raises
        ------
        RunFailedError
            The record has faults, or no evaluation.
        """
        rounds = max(1, self.rounds // entry.epochs)
        settings: dict[str, FlatValue] = {
            "rg": 1,
            "edge-choice": "random",
            **self.base,
            "rounds": rounds,
            "local-epochs": entry.epochs,
            "seed": 2023 + seed,
            **entry.settings,
        }
        windows = -(-rounds // int(settings["rg"]))
        # Shared settings that the row's method does not use, such as `pruning-ratio`, are left out.
        settings = with_defaults({"eval-every": -(-windows // POINTS), **settings}, more)
        # Checkpoints of a large network fill a disk, so a run's folder is deleted after its record is read.
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            tree = LocalTree(Path(folder), self._clients(seed), self.edges)
            out = tree.folder / "runs" / "run"
            out.mkdir(parents=True)
            features = self.folder / "features"  # shared, so that the classifier trains once
            features.mkdir(exist_ok=True)
            (out / "features").symlink_to(features, target_is_directory=True)
            record = tree.run("run", settings).recorder.record
            if record.faults or not record.quality:
                fault = record.faults[0].detail if record.faults else "no evaluation"
                raise RunFailedError(f"{entry.name}: {fault}")
            grid = np.asarray(Image.open(out / "samples" / f"window-{len(record.windows):04d}.png"))
            return Measured(record, training_bytes(record, out / EVENTS_FILE), grid)

    def _clients(self, seed: int) -> list[LocalClient]:
        """Return clients with 2 classes each (FedPhD's partition), connected to every edge."""
        scheme = f"fedphd,seed={seed}" if seed else "fedphd"
        return [
            LocalClient(
                f"client-{i + 1}",
                f"{self.data}:{i}/{self.clients}:{scheme}",
                tuple(range(self.edges)),
                {"device": self.base["device"]},
            )
            for i in range(self.clients)
        ]


def training_bytes(record: RunRecord, events: Path) -> dict[int, dict[str, int]]:
    """Return the cumulative payload bytes of training by window and link, both directions.

    A window's links in the record include evaluation by clients; the event "window-end" is written before it.
    """
    ends = {}
    for line in events.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "window-end":
            ends[event["window"]] = event["links"]
    found = {}
    total, before = dict.fromkeys(LINKS, 0), dict.fromkeys(LINKS, 0)
    for window in record.windows:
        for link in LINKS:
            end, own = ends[window.window][link], window.links[link]
            total[link] += end["up_bytes"] + end["down_bytes"] - before[link]
            before[link] += own.up_bytes + own.down_bytes
        found[window.window] = dict(total)
    return found
