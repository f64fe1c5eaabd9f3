"""The exactness law, for every registered method: a tree gives what flat federated learning gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.local_tree import LocalClient, LocalTree

from espalier.methods.aggregate import Aggregate
from espalier.methods.base import CloudState
from espalier.methods.fedktl import FedKTL
from espalier.methods.registry import METHODS
from espalier.methods.run_config import with_defaults
from espalier.storage.tensor_file import read_tensors
from espalier.wire.class_table import COUNT, MEAN, TABLE
from espalier.wire.sections import SectionId
from espalier_server.window_aggregator import SELECTION
from tests.support.flat import FlatRun
from tests.support.generators import random_gan

Flat = dict[str, bool | int | float | str]

COMMON: Flat = {
    "model": "cnn",
    "rounds": 3,
    "min-edges": 1,
    "min-clients": 5,
    "batch-size": 16,
    "seed": 5,
    "sample-steps": 1,
    "sample-count": 1,
    "edge-choice": "random",
}
U_NET: Flat = {"model": "unet-tiny", "rounds": 2, "learning-rate": 1e-4}
EXITS: Flat = {"model": "depth-cnn", "levels": "1,0.67,0.34"}
#: What a method needs to show all of itself; an absent method runs with the common settings.
OWN: dict[str, Flat] = {
    "feddyn": {"fraction": 0.6},
    "scaffold": {"fraction": 0.6, "server-rate": 0.7},
    "qfedavg": {"fairness-q": 2.0},
    "power-of-choice": {"fraction": 0.4},
    "divfl": {"fraction": 0.4},
    "fedphd": {**U_NET, "aggregation-a": 0, "prune-at": 1},
    "fedphd-os": {**U_NET, "aggregation-a": 0},
    "feddiffuse": {**U_NET, "exchange": "usplit"},
    "phoenix": {
        **U_NET,
        "shared-data": "digits:31/32",
        "shared-count": 8,
        "personal-layers": "conv_in",
    },
    "heterofl": {"model": "cnn-bn"},
    "fjord": {"model": "cnn-bn"},
    "depthfl": EXITS,
    "inclusivefl": EXITS,
    "split-mix": {"base-width": 0.25},
    "ifca": {"shared-layers": "conv1"},
    "cfl": {"cfl-from-round": 2, "cfl-mean-norm": 100.0, "cfl-max-norm": 1e-6},
    "fd": {"families": "cnn,mlp", "soft-label-weight": 1.0},
    "fedproto": {"families": "cnn4,resnet4"},
    "codistillation": {"families": "cnn,mlp"},
    "fedktl": {"families": "cnn4,resnet4", "alignment-epochs": 5},
}
#: Methods whose clients keep networks of their own.
OWN_MODELS = ("codistillation", "fd", "fedktl", "fedproto")
#: With several rounds a window an edge is a flat server of its own, except where only the cloud can choose.
CLOUD_CHOOSES = {
    "divfl": "the clients picked at a window's start train in all its rounds",
    "cfl": "clusters are split by the cloud, after a window",
    "fedktl": "an edge has no generator",
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def _generator(tmp_path_factory: pytest.TempPathFactory) -> None:
    OWN["fedktl"]["generator"] = random_gan(tmp_path_factory.mktemp("generators") / "gan")


def settings_of(method: str) -> Flat:
    return with_defaults(COMMON, {"method": method, **OWN.get(method, {})})


def clients(edges: tuple[int, ...]) -> list[LocalClient]:
    return [LocalClient(f"c{i}", f"digits:{i}/32:pathological=2", edges) for i in range(5)]


def assert_same(tree: CloudState, flat: CloudState) -> None:
    """Compare everything that servers hold, in norm: 1e-5, or exact for what is no float."""
    assert tree.payload.layouts == flat.payload.layouts
    for section, theirs in flat.payload.views().items():
        ours = tree.section(section)
        floats = [n for n, v in ours.items() if v.dtype.kind == "f"]
        apart = np.sqrt(sum(np.sum(np.square(ours[n] - theirs[n], dtype=np.float64)) for n in floats))
        whole = np.sqrt(sum(np.sum(np.square(theirs[n], dtype=np.float64)) for n in floats))
        assert apart <= 1e-5 * whole, f"section {section}: {apart} of {whole}"
        for name, value in ours.items():
            if value.dtype.kind != "f":
                np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def run_flat(method: str, folder: Path) -> FlatRun:
    flat = FlatRun(folder, clients((0,)), settings_of(method))
    flat.run()
    assert flat.faults == []
    return flat


@pytest.mark.parametrize("method", sorted(METHODS))
def test_tree_equals_flat(method: str, tmp_path: Path) -> None:
    """Rg = 1 over two edges is flat: model, server state, and what the selection remembers."""
    flat = run_flat(method, tmp_path)
    run = LocalTree(tmp_path, clients((0, 1)), 2).run("flat", settings_of(method) | {"rg": 1, "min-edges": 2})
    assert run.recorder.record.faults == []
    assert run.state is not None
    both = [w for w in run.recorder.record.windows if len(w.samples) == 2]
    assert both, "no window in which both edges took part"
    assert_same(run.state, flat.state)
    remembered = {SectionId(SELECTION, k): part for k, part in flat.selection.state().items()}
    assert {s for s in run.state.memory if s.name == SELECTION} == set(remembered)
    for section, arrays in {**flat.state.memory, **remembered}.items():
        for name, value in arrays.items():
            ours = run.state.memory[section][name]
            np.testing.assert_allclose(ours, value, rtol=1e-4, atol=1e-6, err_msg=f"{section} {name}")


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(CLOUD_CHOOSES)))
def test_an_edge_is_a_flat_server_between_its_reports(method: str, tmp_path: Path) -> None:
    """All rounds in one window of one edge are flat, too: this is what rg > 1 means for every method."""
    changes: Flat = {"prune-at": 2} if method == "fedphd" else {}
    flat = FlatRun(tmp_path, clients((0,)), settings_of(method) | changes)
    flat.run()
    rounds = settings_of(method)["rounds"]
    run = LocalTree(tmp_path, clients((0,)), 1).run("flat", settings_of(method) | changes | {"rg": rounds})
    assert run.recorder.record.faults == []
    assert run.state is not None
    assert len(run.recorder.record.windows) == 1
    assert_same(run.state, flat.state)


def own_networks(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Return each client's own network as its newest state on disk has it."""
    found = {}
    for client in sorted(p.name for p in folder.iterdir()):
        newest = max((folder / client / "rounds").rglob("*.safetensors"))
        state = read_tensors(newest)
        found[client] = {n: a for n, a in state.items() if n.startswith("own/")}
    return found


@pytest.mark.parametrize("method", OWN_MODELS)
def test_clients_own_networks_are_those_of_the_flat_run(method: str, tmp_path: Path) -> None:
    """What clients keep at home after the run, and what the servers made of their knowledge, to 1e-6."""
    flat = run_flat(method, tmp_path)
    run = LocalTree(tmp_path, clients((0, 1)), 2).run("flat", settings_of(method) | {"rg": 1, "min-edges": 2})
    assert run.state is not None
    assert run.state.round == flat.state.round == 3
    inside, beside = own_networks(tmp_path / "clients"), own_networks(tmp_path / "flat-clients")
    assert list(inside) == list(beside) == [f"c{i}" for i in range(5)]
    assert len({tuple(network) for network in inside.values()}) == 2  # unlike architectures
    for client, network in inside.items():
        assert network
        assert set(network) == set(beside[client])
        for name, array in network.items():
            np.testing.assert_allclose(array, beside[client][name], rtol=1e-4, atol=1e-6, err_msg=name)
    if method in ("fd", "fedproto"):
        np.testing.assert_array_equal(run.state.section(TABLE)[COUNT], flat.state.section(TABLE)[COUNT])
        np.testing.assert_allclose(
            run.state.section(TABLE)[MEAN], flat.state.section(TABLE)[MEAN], rtol=0, atol=1e-6
        )


def test_fedktls_cloud_is_given_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's input, of every round: rows of all clients, sorted by value, whatever edge they came by."""
    seen: list[dict[str, np.ndarray]] = []
    align = FedKTL.central_step

    def central_step(self: FedKTL, state: CloudState, aggregate: Aggregate) -> None:
        seen.append(aggregate.stacked_rows())
        align(self, state, aggregate)

    monkeypatch.setattr(FedKTL, "central_step", central_step)
    run_flat("fedktl", tmp_path)
    LocalTree(tmp_path, clients((0, 1)), 2).run("flat", settings_of("fedktl") | {"rg": 1, "min-edges": 2})
    assert len(seen) == 6
    for flat, tree in zip(seen[:3], seen[3:], strict=True):
        assert len(flat["labels"]) >= 10  # five clients with two classes or more
        np.testing.assert_array_equal(tree["labels"], flat["labels"])
        np.testing.assert_allclose(tree["vectors"], flat["vectors"], rtol=0, atol=1e-6)
