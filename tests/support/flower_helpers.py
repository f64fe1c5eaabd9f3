"""Fleets, residents and messages for tests of the Flower adapters."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from espalier.flower.arrays import array_from_numpy
from espalier.flower.resident import ResidentNode, Upstream
from espalier_edge.fleet.server import InlineFleet, InlineGrid
from tests.support.paths import ROOT
from tests.support.processes import environment, running, wait_until


@contextmanager
def fleet(address: str = "127.0.0.1:0", **options: Any) -> Iterator[InlineFleet]:
    """Run an inline Fleet server."""
    server = InlineFleet(address, **options)
    server.start()
    try:
        yield server
    finally:
        server.stop(0.2)


@contextmanager
def resident(
    app: Callable[[Message, Context], Message], state: Path, *addresses: str, **options: Any
) -> Iterator[ResidentNode]:
    """Run a resident node in a thread."""
    upstreams = [Upstream(address, insecure=True) for address in addresses]
    node = ResidentNode(app, upstreams, state, node_config=options.pop("node_config", {}), **options)
    thread = threading.Thread(target=node.run)
    thread.start()
    try:
        yield node
    finally:
        node.stop()
        thread.join(10)


class Process:
    """A resident node in a process of its own."""

    def __init__(self, process: Any, log: Path) -> None:
        self.process = process
        self.log = log

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Return what it said so far of one kind."""
        said = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in said if line["kind"] == kind]

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait()


@contextmanager
def resident_process(folder: Path, *addresses: str, more: Iterable[str] = ()) -> Iterator[Process]:
    """Run :mod:`tests.support.resident_process`."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log"
    log.write_text("")
    command = [
        sys.executable,
        "-m",
        "tests.support.resident_process",
        str(folder / "state"),
        *addresses,
        *more,
    ]
    root = ROOT
    env = environment(folder, PYTHONPATH=str(root), OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    with running(command, log, env) as process:
        yield Process(process, log)


def online(server: InlineFleet, count: int, timeout: float = 30) -> list[int]:
    """Wait until so many nodes are online; return their ids."""
    wait_until(lambda: len(server.nodes()) == count, timeout, f"{count} nodes online")
    return sorted(node.node_id for node in server.nodes())


def weights(size: int = 256) -> ArrayRecord:
    """Return a flat float32 record of ones."""
    return ArrayRecord({"flat": array_from_numpy(np.ones(size, np.float32))})


def instruct(
    grid: InlineGrid, nodes: Iterable[int], record: ArrayRecord | None = None, kind: str = "train", **do: Any
) -> list[Message]:
    """Make a message for each node, all with the same record."""
    content = RecordDict({"w": record if record is not None else weights(), "do": ConfigRecord(do)})
    return [grid.create_message(content, kind, node, "1") for node in nodes]


def empty(server: InlineFleet) -> bool:
    """Tell whether nothing is left of any message."""
    links = server.fleet
    left = (links.store, links.state.message_ins_store, links.state.message_res_store, links.outstanding)
    sessions = links.state._object_push_sessions
    return not any(len(part) for part in left) and not sessions and links.uploads._by_instruction == {}
