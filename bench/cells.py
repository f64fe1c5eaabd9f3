"""Cells of an experiment: a method, a partition of the data and a seed, each run in a worker process."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from espalier_server.records.record import RunRecord

if TYPE_CHECKING:
    from espalier_server.run import TreeRun

#: Training images of each data set.
TRAIN_IMAGES = {"mnist": 60_000, "fashion-mnist": 60_000, "digits": 1_437}
#: The part of the test split that all methods are evaluated on; a fifth suffices to compare methods.
EVAL_PARTS = {"mnist": "mnist:0/5", "fashion-mnist": "fashion-mnist:0/5", "digits": "digits"}


@dataclass(frozen=True)
class Setup:
    """Settings that all cells of a command share.

    Attributes
    ----------
    data : str
        Name of the data set.
    clients, edges : int
        Size of the tree; every client is connected to every edge.
    images : int
        Approximate training images of a client.
    seeds : int
        Runs of each cell, with seeds 1, 2, ….
    """

    data: str = "mnist"
    clients: int = 20
    edges: int = 2
    images: int = 500
    seeds: int = 3

    @property
    def shares(self) -> int:
        """Number of shares that the data are partitioned into; each client holds one of them."""
        return max(self.clients, TRAIN_IMAGES[self.data] // self.images)


@dataclass(frozen=True)
class Cell:
    """One run of an experiment.

    Attributes
    ----------
    setup : Setup
        Data and tree.
    scheme : str
        The partition, as in a data SPEC, without its seed.
    settings : Mapping
        The run's settings beyond those of :func:`run_cell`.
    seed : int
        Seed of the run and of the partition.
    present : int
        Number of clients that take part, from the first one; 0: all.
    minority : int
        Number of clients, from the last one, that hold shares with odd numbers while the others hold those with
        even ones, so that with ``+rotate=2`` only the minority's images are rotated; 0: consecutive shares.
    devices : {"", "with-data", "against-data"}
        Levels set by the devices: clients sorted by data, from the largest or from the smallest, get the
        values of `levels` in their order, in equal groups.
    """

    setup: Setup
    scheme: str
    settings: Mapping[str, bool | int | float | str]
    seed: int = 1
    present: int = 0
    minority: int = 0
    devices: str = ""

    def key(self) -> str:
        """Return a digest of everything that determines the result of the cell."""
        content = dataclasses.asdict(self)
        content["setup"].pop("seeds")
        if not self.minority:
            del content["minority"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]

    def specs(self) -> list[str]:
        """Return the data SPEC of every client."""
        shares, clients = self.setup.shares, self.setup.clients
        head, plus, options = self.scheme.partition("+")
        scheme = f"{head},seed={self.seed}{plus}{options}"
        # Shares by similarity are sorted by class: the first ones alone would lack most classes.
        step = shares // clients if head.startswith("similarity") else 2 if self.minority else 1
        numbers = [i * step + (self.minority > clients - 1 - i) for i in range(clients)]
        return [f"{self.setup.data}:{i}/{shares}:{scheme}" for i in numbers[: self.present or clients]]


@dataclass(frozen=True)
class Point:
    """Accuracies after a round, in [0, 1]; None where a measure does not exist."""

    round: int
    accuracy: float | None
    mean: float | None
    worst: float | None

    @property
    def main(self) -> float:
        """Accuracy of the global model, or the clients' mean accuracy if there is no global model."""
        return self.accuracy if self.accuracy is not None else (self.mean or 0.0)


@dataclass(frozen=True)
class Measured:
    """Result of a cell.

    Attributes
    ----------
    points : list of Point
        In the order of the rounds.
    links : dict of str to float
        Payload bytes of a round without evaluation, by link and direction ("client-edge up", …).
    seconds : float
        Wall time of the run.
    trained : float
        Seconds of the run that were spent in windows.
    status : str
        "finished", or an error message.
    faults : int
        Number of faults in the record.
    """

    points: list[Point]
    links: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    trained: float = 0.0
    status: str = "finished"
    faults: int = 0

    @property
    def last(self) -> Point:
        """Mean of the last three measurements, as single rounds vary a lot on non-IID data."""
        tail = self.points[-3:] or [Point(0, None, None, None)]

        def of(values: list[float | None]) -> float | None:
            known = [v for v in values if v is not None]
            return mean(known) if known else None

        return Point(
            tail[-1].round,
            of([p.accuracy for p in tail]),
            of([p.mean for p in tail]),
            of([p.worst for p in tail]),
        )

    @property
    def best(self) -> Point:
        """The measurement with the highest mean over the clients, which papers report that have no validation set."""
        return max(self.points, key=lambda p: p.mean or 0.0, default=Point(0, None, None, None))

    def rounds_to(self, target: float) -> int | None:
        """Return the first measured round of at least this accuracy, None if there was none."""
        return next((p.round for p in self.points if p.main >= target), None)


def run_cell(cell: Cell, on_finished: Callable[[TreeRun], None] | None = None) -> Measured:
    """Run a cell in this process; `on_finished` is called with the finished run."""
    import torch

    from bench.local_tree import LocalClient, LocalTree
    from espalier.errors import EspalierError
    from espalier.methods.run_config import with_defaults

    torch.set_num_threads(1)
    edges = tuple(range(cell.setup.edges))
    clients = [
        LocalClient(f"client-{i:03d}", spec, edges, config)
        for i, (spec, config) in enumerate(zip(cell.specs(), _node_configs(cell), strict=True))
    ]
    settings = {
        "model": "mlp",
        "rg": 1,
        "batch-size": 50,
        "eval-data": EVAL_PARTS[cell.setup.data],
        "eval-clients": True,
        "eval-every": 2,
        "keep-checkpoints": 1,
        "min-edges": cell.setup.edges,
        "min-clients": len(clients),
        "seed": cell.seed,
        **cell.settings,
    }
    start = time.perf_counter()
    # State folders and checkpoints are synchronised to disk, which costs no time on a RAM disk.
    ram_disk = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=ram_disk if os.access(ram_disk, os.W_OK) else None) as folder:
        tree = LocalTree(Path(folder), clients, cell.setup.edges)
        try:
            # Settings that the cell's method does not use are left out.
            run = tree.run("bench", with_defaults(settings, {}))
        except EspalierError as error:
            return Measured([], status=str(error))
        seconds = time.perf_counter() - start
        if on_finished is not None:
            on_finished(run)
    return read_record(run.recorder.record, seconds)


def _node_configs(cell: Cell) -> list[dict[str, Any]]:
    """Return the additional node config of every client: its level, if devices set levels."""
    specs = cell.specs()
    if not cell.devices:
        return [{} for _ in specs]
    from espalier.data.spec import open_data
    from espalier.methods.levels import parse_levels

    levels = parse_levels(str(cell.settings["levels"]))
    sizes = [len(open_data(spec)) for spec in specs]
    order = sorted(
        range(len(specs)), key=lambda i: (-sizes[i] if cell.devices == "with-data" else sizes[i], i)
    )
    return [{"level": levels[order.index(i) * len(levels) // len(specs)]} for i in range(len(specs))]


def read_record(record: RunRecord, seconds: float) -> Measured:
    """Return the result of a cell from the record of its run."""
    points = [
        Point(
            a.round,
            a.models["global"].accuracy if "global" in a.models else None,
            a.mean,
            a.worst10,
        )
        for a in record.accuracy
    ]
    measured = {a.window for a in record.accuracy}
    # Evaluation sends bytes, too; only windows without it show the method's own.
    plain = [w for w in record.windows if w.window not in measured] or record.windows
    links = {
        f"{link} {way}": mean(getattr(w.links[link], f"{way}_bytes") for w in plain)
        for link in record.links
        for way in ("up", "down")
    }
    trained = sum(w.timings.get("train", 0.0) for w in record.windows)
    return Measured(points, links, seconds, trained, record.status, len(record.faults))


def run_cells(
    cells: Iterable[Cell], jobs: int, root: Path, results_file: Path | None = None
) -> dict[str, Measured]:
    """Run cells in worker processes and return their results by key.

    Parameters
    ----------
    cells : iterable of Cell
        Cells; duplicates are run once.
    jobs : int
        Number of worker processes, each of which uses one core.
    root : Path
        Folder of the data files.
    results_file : Path, optional
        A file (JSON lines) to append results to; cells that it contains are not run again.
    """
    wanted = {cell.key(): cell for cell in cells}
    found = {key: value for key, value in _load_results(results_file) if key in wanted}
    # Cells with the same partition are adjacent, so that a worker opens it once.
    pending = sorted(
        (c for k, c in wanted.items() if k not in found), key=lambda c: (c.seed, c.scheme, c.setup.shares)
    )
    if jobs <= 1 and len(pending) <= 8:
        with cell_environment(root):
            results: Iterator[tuple[str, Measured]] = map(_run, pending)
            for key, measured in results:
                found[key] = measured
                _append_result(results_file, key, measured)
        return found
    with (
        _environment(_variables(root)),
        multiprocessing.get_context("spawn").Pool(jobs, _init_worker) as pool,
    ):
        for key, measured in pool.imap_unordered(_run, pending):
            found[key] = measured
            _append_result(results_file, key, measured)
    return found


@contextlib.contextmanager
def cell_environment(root: Path) -> Iterator[None]:
    """Prepare this process to run cells; restore environment and log level on exit."""
    espalier = logging.getLogger("espalier")
    level = espalier.level
    with _environment(_variables(root)):
        _init_worker()
        try:
            yield
        finally:
            espalier.setLevel(level)


def _variables(root: Path) -> dict[str, str]:
    return {"ESPALIER_DATA": str(root), "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}


def _init_worker() -> None:
    """Prepare a process that runs many clients: errors only in the log, data sets stay open between cells."""
    from espalier.data.spec import sharing_sources

    logging.getLogger("espalier").setLevel(logging.ERROR)
    _OPEN.enter_context(sharing_sources())


_OPEN = contextlib.ExitStack()


def _run(cell: Cell) -> tuple[str, Measured]:
    return cell.key(), run_cell(cell)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _load_results(file: Path | None) -> Iterator[tuple[str, Measured]]:
    if file is None or not file.exists():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        points = [Point(**p) for p in entry["measured"].pop("points")]
        yield entry["key"], Measured(points, **entry["measured"])


def _append_result(file: Path | None, key: str, measured: Measured) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"key": key, "measured": dataclasses.asdict(measured)}) + "\n")


def average(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    known = [v for v in values if v is not None]
    return mean(known) if known else None


def spread(values: Iterable[float | None]) -> float | None:
    """Return the sample standard deviation of the values that are not None; None for fewer than two."""
    known = [v for v in values if v is not None]
    return stdev(known) if len(known) > 1 else None
