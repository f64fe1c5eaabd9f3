"""Knowledge exchange between unlike models over real processes: as without links, and a killed client goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from bench.knowledge_sizes import pair_bytes, table_bytes
from bench.local_tree import LocalClient, LocalTree
from bench.stock import wait_until
from PIL import Image

from espalier_server.run import TreeRun
from tests.support.generators import random_gan
from tests.support.tree import LiveTree, live_tree, start_client

pytestmark = pytest.mark.usefixtures("one_thread")

Flat = dict[str, bool | int | float | str]

#: Two clients an edge, whose models differ; at 8 pixels all of their features have 512 numbers.
PLACES = {"c0": "edge-1", "c1": "edge-1", "c2": "edge-2", "c3": "edge-2"}
DATA = "digits:{i}/32:dirichlet=0.5,seed=1"
SHORT: Flat = {"rounds": 3, "rg": 1, "min-edges": 2, "min-clients": 4, "seed": 5, "batch-size": 8}
SHORT |= {"model": "mlp", "families": "cnn,mlp", "local-steps": 2, "eval-clients": True, "eval-every": 3}
LATENT = 128


class Processes:
    """The tree and its clients, one of which can be killed."""

    def __init__(self, tree: LiveTree, stack: ExitStack) -> None:
        self.tree, self.stack = tree, stack
        self.pids: dict[str, int] = {}

    def start(self, name: str, data: str) -> None:
        """Start a client and wait until it is connected to its edge."""
        log = self.tree.folder / f"{name}.log"
        before = log.read_text().count("connected to") if log.exists() else 0
        edge = PLACES.get(name, "edge-1")
        self.pids[name] = self.stack.enter_context(start_client(self.tree, name, data, [edge]))
        wait_until(lambda: self.tree.log(name).count("connected to") > before, 60, name)

    def kill(self, name: str) -> None:
        """Kill a client and wait until it is gone."""
        os.kill(self.pids[name], signal.SIGKILL)
        wait_until(lambda: not _runs(self.pids[name]), 30, f"the end of {name}")


def _runs(pid: int) -> bool:
    """Whether a process does; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with live_tree(tmp_path_factory.mktemp("live"), clients=0) as tree, ExitStack() as stack:
        processes = Processes(tree, stack)
        for i, name in enumerate(PLACES):
            processes.start(name, DATA.format(i=i))
        yield processes


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_gan(tmp_path_factory.mktemp("gan") / "gan", latent_dim=LATENT)


def twin(folder: Path) -> LocalTree:
    """Return the live tree's twin in this process."""
    edges = [(int(edge[-1]) - 1,) for edge in PLACES.values()]
    clients = [LocalClient(n, DATA.format(i=i), edges[i]) for i, n in enumerate(PLACES)]
    return LocalTree(folder, clients, 2)


def check_alike(live: TreeRun, local: TreeRun) -> None:
    """Check that losses, accuracies and what crossed the links are the same over processes and without them."""
    one, other = live.recorder.record, local.recorder.record
    for record in (one, other):
        assert (record.status, record.faults) == ("finished", [])
        assert [w.participants for w in record.windows] == [list(PLACES)] * len(other.windows)
    for a, b in zip(one.windows, other.windows, strict=True):
        assert a.losses == pytest.approx(b.losses, rel=1e-4)
        for link in a.links:  # numbers in control messages, such as seconds, vary in length
            assert a.links[link].up_bytes == pytest.approx(b.links[link].up_bytes, rel=0.02)
            assert a.links[link].down_bytes == pytest.approx(b.links[link].down_bytes, rel=0.02)
    assert one.accuracy[-1].clients.keys() == PLACES.keys()
    assert one.accuracy[-1].clients == pytest.approx(other.accuracy[-1].clients, abs=0.02)


#: Settings, and the bytes of knowledge that a client gets in a round: counts and a round go with a table.
METHODS: dict[str, tuple[Flat, int]] = {
    "fd": ({}, table_bytes(10, 10) + 88),
    "fedproto": ({"families": "cnn4,resnet4"}, table_bytes(10, 512) + 88),
    "fedktl": ({"alignment-epochs": 5}, pair_bytes(10, (1, 8, 8), LATENT, pixel_bytes=1)),
    "codistillation": ({"peer-burn-in": 1}, 0),
    "fd+faug": ({"augment": "faug", "faug-steps": 5}, table_bytes(10, 10) + 88),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_live_run_equals_one_without_links(
    live: Processes, generator: str, tmp_path: Path, method: str
) -> None:
    more, knowledge = METHODS[method]
    settings: Flat = {**SHORT, **more, "method": method.partition("+")[0]}
    if method == "fedktl":
        settings["generator"] = generator
    name = method.replace("+", "-")
    run = live.tree.run_flat(name, settings)
    check_alike(run, twin(tmp_path).run(name, settings))
    first, second = (w.links["client-edge"].down_bytes / len(PLACES) for w in run.recorder.record.windows[:2])
    if method == "codistillation":  # the others' copies come after the burn-in
        assert second > first + 3 * 4 * 10_000
    else:  # beside it lie the plan and the layout
        assert knowledge < second < knowledge + 2_000


def test_a_killed_client_keeps_its_own_model(live: Processes, tmp_path: Path) -> None:
    settings: Flat = {**SHORT, "method": "fd", "learning-rate": 0.1}
    own = live.tree.folder / "c1"

    def between(run: TreeRun) -> None:
        if run.recorder.record.windows[-1].window == 1:
            live.kill("c1")
            assert any("killed" in str(p) for p in own.rglob("*"))
            live.start("c1", DATA.format(i=1))

    broken = live.tree.run_flat("killed", settings, between)
    check_alike(broken, twin(tmp_path / "whole").run("killed", settings))


def test_a_client_with_other_classes_is_refused(live: Processes, tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for i in range(2):
            Image.new("L", (8, 8), 60 * i).save(tmp_path / label / f"{i}.png")

    def between(run: TreeRun) -> None:
        if run.recorder.record.windows[-1].window == 1:
            live.start("stranger", str(tmp_path))
            run.tree.refresh(all_edges=True)

    record = live.tree.run_flat("strange", {**SHORT, "method": "fd"}, between).recorder.record
    [fault] = record.faults
    assert (fault.node, fault.kind) == ("stranger", "refused")
    assert "its classes ['cat', 'dog']… are not those of c" in fault.detail
    assert f"left out of run strange: {fault.detail}" in live.tree.log("stranger")
    assert record.windows[-1].participants == list(PLACES)
