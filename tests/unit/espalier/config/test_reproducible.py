"""Reproducible runs: the same bits whoever answers first, and over a kill and a resume at any instant."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.local_grid import LocalGrid
from bench.local_tree import LocalClient, LocalTree
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st

from espalier.config.reproducible import in_order
from espalier.errors import ConfigError
from espalier.methods.run_config import RunConfig, with_defaults
from espalier.training.determinism import deterministic
from espalier_client import device
from espalier_edge.rounds import EdgeWindow
from espalier_server import run as server_run
from espalier_server.records import checkpoint
from espalier_server.records.checkpoint import Checkpoints
from espalier_server.records.recorder import RunRecorder
from espalier_server.records.snapshot import Snapshot
from espalier_server.run import TreeRun
from espalier_server.window_aggregator import WindowAggregator
from tests.support.generators import random_gan

Flat = dict[str, bool | int | float | str]

COMMON: Flat = {
    "reproducible": True,
    "model": "cnn",
    "rounds": 6,
    "rg": 2,
    "min-edges": 2,
    "min-clients": 4,
    "batch-size": 16,
    "seed": 5,
    "sample-steps": 1,
    "sample-count": 1,
    "edge-choice": "random",
}
#: Unlike methods, each with what makes it keep something from window to window.
METHODS: dict[str, Flat] = {
    "fedavg": {"optimizer": "adam", "ema-decay": 0.5, "codec": "qsgd"},
    "scaffold": {"fraction": 0.5},
    "feddyn": {"fraction": 0.6, "codec": "top-k"},
    "fedphd": {
        "model": "unet-tiny",
        "rounds": 3,
        "rg": 1,
        "prune-at": 2,
        "edge-choice": "homogeneity",
        "batch-size": 32,
    },
    "fedktl": {"families": "cnn4,resnet4", "alignment-epochs": 3},
    "ifca": {"shared-layers": "conv1"},
    "power-of-choice": {"fraction": 0.5, "selection": "rpow-d"},
    "divfl": {"fraction": 0.5},
    "cfl": {"cfl-from-round": 2, "cfl-mean-norm": 100.0, "cfl-max-norm": 1e-6},
    "codistillation": {"families": "cnn,mlp"},
}
CLIENTS = [LocalClient(f"c{i}", f"digits:{i}/64:pathological=2", (0, 1), {"homes": 2}) for i in range(4)]


class Killed(BaseException):
    """The whole tree was killed: nobody catches it."""


def settings_of(method: str) -> Flat:
    return with_defaults(COMMON, {"method": method, **METHODS.get(method, {})})


@pytest.fixture(scope="module", autouse=True)
def _generator(tmp_path_factory: pytest.TempPathFactory) -> None:
    METHODS["fedktl"]["generator"] = random_gan(tmp_path_factory.mktemp("generators") / "gan")


def run(folder: Path, settings: Flat, name: str = "r") -> TreeRun:
    """Start every tier anew on what is on disk, and run to the end."""
    device._device.cache_clear()
    return LocalTree(folder, CLIENTS, 2).run(name, settings)


def bits(run: TreeRun) -> dict[str, bytes]:
    """Return everything that the run's end is made of: the cloud's state, the kept model, the clients' states."""
    assert run.state is not None
    tensors, meta = Snapshot(run.state, members=run.tree.frozen_members).pack()
    found = {name: array.tobytes() for name, array in tensors.items()}
    described = ("window", "round", "architecture", "sections", "memory", "members")
    found |= {name: repr(meta[name]).encode() for name in described}
    clients = run.out.parent.parent / "clients"
    for path in [*(run.out / "model").glob("*.safetensors"), *sorted(clients.glob("*/rounds/*/*"))]:
        found[str(path.relative_to(run.out.parent.parent))] = path.read_bytes()
    return found


def assert_same_bits(one: TreeRun, other: TreeRun) -> None:
    a, b = bits(one), bits(other)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []


# --- order ---------------------------------------------------------------------------------------------


@given(st.permutations("abcdef"), st.sets(st.sampled_from("abcdef")), st.integers(0, 6))
def test_what_arrives_is_yielded_in_the_order_of_names(order: list[str], mute: set[str], come: int) -> None:
    arrivals = [(name, None if name in mute else name) for name in order[:come]]
    assert list(in_order(arrivals, "abcdef")) == sorted(set(order[:come]) - mute)


def test_an_item_leaves_as_soon_as_those_before_it_are_settled() -> None:
    taken: list[str] = []

    def arrive() -> Iterator[tuple[str, str | None]]:
        for name, item, before in (("b", "B", []), ("a", None, []), ("d", "D", ["B"]), ("c", "C", ["B"])):
            assert taken == before
            yield name, item

    for item in in_order(arrive(), "abcd"):
        taken.append(item)  # noqa: PERF402 - step by step
    assert taken == ["B", "C", "D"]


class Shuffled(LocalGrid):
    """Links of unlike speed: replies come in another order every time."""

    seeds = itertools.count()

    def exchange(self, messages: Iterable[Message], **more: object) -> Iterator[Message]:
        replies = list(super().exchange(messages, **more))
        order = np.random.default_rng(next(self.seeds)).permutation(len(replies))
        yield from (replies[i] for i in order)


def shuffle(patch: pytest.MonkeyPatch) -> None:
    for place in ("bench.local_grid.LocalGrid", "bench.local_tree.LocalGrid"):
        patch.setattr(place, Shuffled)


@pytest.mark.parametrize("method", METHODS)
def test_who_answers_first_does_not_matter(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = run(tmp_path / "still", settings_of(method))
    assert still.recorder.record.faults == []
    shuffle(monkeypatch)
    assert_same_bits(run(tmp_path / "shuffled", settings_of(method)), still)


def test_without_the_setting_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: sums by arrival differ in their last bits."""
    settings = settings_of("fedavg") | {"reproducible": False}
    still = run(tmp_path / "still", settings)
    shuffle(monkeypatch)
    other = run(tmp_path / "shuffled", settings)
    assert still.state is not None
    assert other.state is not None
    assert any(a.tobytes() != other.state.tensors[n].tobytes() for n, a in still.state.tensors.items())


def test_arithmetic_is_given_back_as_it_was() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with deterministic():
            assert torch.get_num_threads() == 1
            assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_num_threads() == 2
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("edge-choice", "shape"),
        ("level-choice", "speed"),
        ("histogram-epsilon", 1.0),
        ("device", "cuda"),
    ],
)
def test_settings_that_leave_it_to_chance_are_refused(key: str, value: float | str) -> None:
    method = {"method": "fjord", "model": "cnn"} if key == "level-choice" else {}
    with pytest.raises(ConfigError, match=f"{key}: .*reproducible"):
        RunConfig.from_flat({"reproducible": True, **method, key: value})
    RunConfig.from_flat({**method, key: value})


# --- kill and resume -------------------------------------------------------------------------------------


def kill_when(patch: pytest.MonkeyPatch, owner: Any, name: str, count: int, *, before: bool = True) -> None:
    """Kill the tree at the count-th call of something, before it does its work or after."""
    real, calls = getattr(owner, name), itertools.count(1)

    def call(*arguments: Any, **more: Any) -> Any:
        now = next(calls) == count
        if now and before:
            raise Killed
        result = real(*arguments, **more)
        if now:
            raise Killed
        return result

    patch.setattr(owner, name, call)


#: Where a run can be killed, in its second window where it has windows.
INSTANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "after hello": lambda p: kill_when(p, server_run, "wait_for_members", 1, before=False),
    "before the first window": lambda p: kill_when(p, WindowAggregator, "draw", 1),
    "in a window, between two clients": lambda p: kill_when(p, device.Device, "save_state", 6, before=False),
    "in a window, before a client saves": lambda p: kill_when(p, device.Device, "save_state", 7),
    "in a window, after an edge": lambda p: kill_when(p, EdgeWindow, "run", 3, before=False),
    "between aggregation and checkpoint": lambda p: kill_when(p, RunRecorder, "checkpoint", 2),
    "while a checkpoint is written": lambda p: kill_when(p, checkpoint, "write_tensors", 2, before=False),
    "when a checkpoint has its place": lambda p: kill_when(p, Checkpoints, "_remove_old", 2),
    "after a checkpoint": lambda p: kill_when(p, RunRecorder, "checkpoint", 2, before=False),
    "after the last checkpoint": lambda p: kill_when(p, RunRecorder, "checkpoint", 3, before=False),
    "at the last word": lambda p: kill_when(p, TreeRun, "_close", 1),
}
#: All instants for one method, the two that are hardest for each of the others.
CASES = [("fedavg", i) for i in INSTANTS] + [
    (m, i)
    for m in METHODS
    if m != "fedavg"
    for i in ("in a window, before a client saves", "after a checkpoint")
]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TreeRun]:
    known: dict[str, TreeRun] = {}

    def of(method: str) -> TreeRun:
        if method not in known:
            known[method] = run(tmp_path_factory.mktemp("unbroken"), settings_of(method))
        return known[method]

    return of


@pytest.mark.parametrize(("method", "instant"), CASES)
def test_a_killed_run_ends_as_the_unbroken_one(
    method: str, instant: str, tmp_path: Path, unbroken: Callable[[str], TreeRun]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        INSTANTS[instant](patch)
        with pytest.raises(Killed):
            run(tmp_path, settings_of(method))
    resumed, whole = run(tmp_path, settings_of(method)), unbroken(method)
    assert_same_bits(resumed, whole)
    record, other = resumed.recorder.record, whole.recorder.record
    assert record.status == "finished"
    assert [w.losses for w in record.windows] == [w.losses for w in other.windows]
    assert record.model == other.model
