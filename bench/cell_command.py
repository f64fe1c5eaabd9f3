"""The command line that `bench.methods` and `bench.knowledge` share, and the set-up that its options describe."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bench.cells import TRAIN_IMAGES, Setup
from bench.report import Outcome, parser

#: Folders below ``--root`` of the data sets that are read from files.
_FOLDERS = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw"}


def cell_parser(name: str, about: str, jobs: int) -> argparse.ArgumentParser:
    """Return a parser with the options of both benches; `jobs` is the default of ``--jobs``."""
    options = parser(name, about)
    options.add_argument(
        "--data", default="mnist", choices=sorted(TRAIN_IMAGES), help="digits if its files are missing"
    )
    default_root = os.environ.get("ESPALIER_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
    options.add_argument("--root", type=Path, default=Path(default_root), help="folder of the data files")
    options.add_argument("--clients", type=int, default=20)
    options.add_argument("--edges", type=int, default=2)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--images", type=int, default=500, help="approximate training images of a client")
    options.add_argument("--jobs", type=int, default=jobs, help="worker processes")
    options.add_argument("--resume", action="store_true", help="reuse the results in cells.jsonl in DIR")
    return options


def setup_of(arguments: argparse.Namespace, outcome: Outcome) -> Setup:
    """Return the set-up that the options describe; digits replace missing files, and a note says so."""
    data = "digits" if arguments.tiny else arguments.data
    if data in _FOLDERS and not (arguments.root / _FOLDERS[data]).is_dir():
        outcome.notes.append(f"{data} is not in --root; digits were used instead")
        data = "digits"
    if arguments.tiny:
        return Setup(data, clients=4, edges=2, images=100, seeds=1)
    return Setup(data, arguments.clients, arguments.edges, arguments.images, arguments.seeds)


def results_file_of(arguments: argparse.Namespace) -> Path | None:
    """Return the file of results in ``--out``, None without it; old results are deleted unless ``--resume``."""
    if arguments.out is None:
        return None
    file: Path = arguments.out / "cells.jsonl"
    if not arguments.resume:
        file.unlink(missing_ok=True)
    return file
