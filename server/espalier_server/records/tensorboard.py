"""TensorBoard events of a run, if tensorboard is installed (extra `cloud`)."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from espalier import lazy
from espalier_server.records.record import AccuracyEntry, Evaluation, WindowEntry

if TYPE_CHECKING:
    from torch.utils import tensorboard
else:
    tensorboard = lazy.load("torch.utils.tensorboard")


class TensorBoardWriter:
    """Writes a run's curves; does nothing if tensorboard is not installed.

    Parameters
    ----------
    folder : Path
        Log folder, for ``tensorboard --logdir``.
    """

    def __init__(self, folder: Path) -> None:
        self._writer: tensorboard.SummaryWriter | None = None
        if importlib.util.find_spec("tensorboard") is not None:
            self._writer = tensorboard.SummaryWriter(str(folder))

    def window(self, entry: WindowEntry) -> None:
        """Write the loss of each round, and the weights, scores, traffic and timings of a window."""
        for round_ in entry.rounds:
            self._add("train/loss", round_.loss, round_.round)
        for edge, value in entry.rho.items():
            self._add(f"rho/{edge}", value, entry.window)
        for edge, value in entry.mu.items():
            self._add(f"mu/{edge}", value, entry.window)
        self._add("mu/planned", entry.mu_planned, entry.window)
        self._add("mu/random", entry.mu_random, entry.window)
        for link, traffic in entry.links.items():
            self._add(f"bytes/{link}/up", traffic.up_bytes, entry.window)
            self._add(f"bytes/{link}/down", traffic.down_bytes, entry.window)
        for group, count in Counter(entry.assignments.values()).items():
            self._add(f"clients/{group.replace(' ', '-')}", count, entry.window)
        for name, seconds in entry.timings.items():
            self._add(f"seconds/{name}", seconds, entry.window)

    def evaluation(self, entry: Evaluation) -> None:
        """Write the quality measures after a window."""
        for measure in ("frechet", "inception_score", "kid"):
            self._add(f"quality/{measure}", getattr(entry, measure), entry.window)
        if self._writer is not None:
            self._writer.flush()

    def accuracy(self, entry: AccuracyEntry) -> None:
        """Write the accuracy and loss of every model, and the clients' mean and worst tenth."""
        for name, score in entry.models.items():
            label = name.replace(" ", "-")
            self._add(f"accuracy/{label}", score.accuracy, entry.round)
            self._add(f"test-loss/{label}", score.loss, entry.round)
        self._add("accuracy/clients/mean", entry.mean, entry.round)
        self._add("accuracy/clients/worst10", entry.worst10, entry.round)
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        if self._writer is not None:
            self._writer.close()

    def _add(self, name: str, value: float | None, step: int) -> None:
        if self._writer is not None and value is not None:
            self._writer.add_scalar(name, value, step)
