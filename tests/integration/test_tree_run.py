"""Runs on one tree of real processes: edges and clients stay, run after run."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bench.stock import SuperLink, app_bundle, serverapp_grid, superlink
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg

from espalier.errors import EspalierError
from espalier.methods.run_config import RunConfig
from espalier.models.initial import initial_model
from espalier.models.pipeline import load_pipeline
from espalier.security.name_registry import NameRegistry
from espalier_client.privacy_accounting import epsilon_of
from espalier_server.client_keys import ClientKeys
from espalier_server.planning.joining import wait_for_members
from espalier_server.planning.tree import Tree
from espalier_server.records.checkpoint import Checkpoints
from espalier_server.records.snapshot import Snapshot
from espalier_server.superlink.grid import TreeGrid
from tests.support.tree import LiveTree, live_tree, start_client

Flat = dict[str, bool | int | float | str]

#: Small enough for a test: 90 images a client, three optimiser steps a round.
SMALL: Flat = {"learning-rate": 0.0001, "seed": 7}


@pytest.fixture(scope="module")
def flat_link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    """Run a second stock SuperLink that the clients reach directly."""
    with superlink(tmp_path_factory.mktemp("flat") / "link") as link:
        yield link


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, flat_link: SuperLink) -> Iterator[LiveTree]:
    with live_tree(tmp_path_factory.mktemp("tree"), edges=2, clients=3, more=[flat_link.fleet]) as live:
        yield live


def initial_arrays(settings: Flat) -> ArrayRecord:
    model = initial_model(RunConfig.from_flat(settings), (1, 8, 8))
    return ArrayRecord({n: Array(t.numpy()) for n, t in model.state_dict().items()})


def flower_config(settings: Flat) -> str:
    """Return the run's settings as the default configuration of a Flower app."""
    return "".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items())


def test_fedphd_trains_prunes_and_leaves_everything(tree: LiveTree) -> None:
    run = tree.run(
        "fedphd",
        rounds=4,
        rg=2,
        prune_at=2,
        min_edges=2,
        min_clients=3,
        eval_data="digits",
        eval_samples=50,
        sample_steps=4,
        sample_count=9,
        ema_decay=0.5,
    )
    out = tree.folder / "runs" / "fedphd"
    report = json.loads((out / "report.json").read_text())
    assert report["status"] == "finished"
    assert report["method"] == "fedphd"
    assert report["config"]["rounds"] == 4
    assert [len(w["losses"]) for w in report["windows"]] == [2, 2]
    assert report["windows"][0]["participants"] == ["c0", "c1", "c2"]
    assert sum(report["windows"][0]["rho"].values()) == pytest.approx(1)
    assert all(1 < mu <= 2 for mu in report["windows"][0]["mu"].values())
    model = report["model"]
    assert model["params"] < 0.75 * model["params_dense"]
    assert model["macs"] < 0.75 * model["macs_dense"]
    # Payload bytes: every client gets and sends the model once a round, every edge once a window.
    dense, pruned = 4 * model["params_dense"], 4 * model["params"]
    up = report["links"]["client-edge"]["up_bytes"]
    assert up == pytest.approx(3 * 2 * (dense + pruned), rel=0.001)
    assert report["links"]["edge-cloud"]["messages"] <= 8
    quality = report["quality"][-1]
    assert quality["features"] == "digits features"
    assert 0 < quality["floor"]["frechet"] < quality["noise"]["frechet"]
    assert report["faults"] == []
    # Every update of three clients in four rounds is signed, and checked at its edge and at the cloud.
    trained = [p for w in report["windows"] for r in w["rounds"] for p in r["participants"]]
    assert [p["signed"] for p in trained] == [True] * 12
    found = [w["signatures"] for w in report["windows"]]
    assert found == [{"edges": 6, "cloud": 6, "unsigned": []}] * 2
    assert (out / "samples.png").stat().st_size > 500
    assert (out / "report.html").read_text().startswith("<!")
    assert list((out / "tensorboard").iterdir())
    assert run.recorder.checkpoints.windows() == [1, 2]
    pipeline = load_pipeline(out / "model")
    assert sum(p.numel() for p in pipeline.unet.parameters()) == model["params"]


Model = dict[str, np.ndarray]


def checkpoint_of(tree: LiveTree, name: str, window: int) -> Model:
    checkpoints = Checkpoints(tree.folder / "runs" / name / "checkpoints")
    return Snapshot.unpack(*checkpoints.load(window)).state.weights.views()


@pytest.fixture(scope="module")
def flat(tree: LiveTree, flat_link: SuperLink) -> dict[int, Model]:
    """Flat Flower FedAvg: a stock SuperLink and strategy, the tree's clients directly below it, by round."""
    models: dict[int, Model] = {}

    def keep(round_: int, arrays: ArrayRecord) -> None:
        models[round_] = {name: array.numpy() for name, array in arrays.items()}

    with serverapp_grid(flat_link, app_bundle("", config=flower_config(SMALL))) as grid:
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
        strategy.start(TreeGrid(grid), initial_arrays(SMALL), num_rounds=3, timeout=120, evaluate_fn=keep)
    return models


def distance(a: Model, b: Model | None) -> float:
    """Return the Euclidean distance of two models, or the norm of one."""
    squares = [np.sum((v.astype(np.float64) - (b[n] if b else 0.0)) ** 2) for n, v in a.items()]
    return float(np.sqrt(sum(squares)))


#: Settings under which a method is FedAvg: homogeneity does not count, and nothing is pruned.
FLAT: dict[str, Flat] = {
    "fedavg": {},
    "fedphd": {"selection_a": 0, "aggregation_a": 0, "pruning_ratio": 0},
}


@pytest.mark.parametrize("method", FLAT)
def test_tree_equals_flat_flower(tree: LiveTree, flat: dict[int, Model], method: str) -> None:
    """With rg=1 and a=b=0 the tree gives what flat Flower gives, with the same clients and seeds."""
    tree.run(
        f"flat-{method}",
        method=method,
        rounds=3,
        rg=1,
        min_edges=2,
        min_clients=3,
        sample_steps=2,
        sample_count=1,
        **FLAT[method],
        **{key.replace("-", "_"): value for key, value in SMALL.items()},
    )
    first, last = (checkpoint_of(tree, f"flat-{method}", window) for window in (1, 3))
    assert first.keys() == flat[1].keys()
    for name, array in flat[1].items():
        np.testing.assert_allclose(first[name], array, rtol=1e-5, atol=1e-7, err_msg=name)
    # Later rounds in norm: Adam's steps are near lr·sign(g), so where a gradient is all but zero the
    # last bit of a sum, in which the two differ, decides its sign.
    apart = distance(last, flat[3])
    assert apart <= 1e-5 * distance(flat[3], None)
    assert apart <= 0.02 * distance(flat[3], flat[0])  # and that is little of what was learnt


def test_a_private_run(tree: LiveTree) -> None:
    """Losses that clients keep to themselves pass every check and signature; what is spent is in the report."""
    run = tree.run(
        "private",
        method="fedavg",
        model="cnn",
        rounds=2,
        rg=1,
        min_edges=2,
        min_clients=3,
        dp_sgd_noise=1.0,
        update_clip=1.0,
        update_noise=4.0,
        histogram_epsilon=1.0,
    )
    record = run.recorder.record
    assert record.faults == []
    assert all(p.signed for w in record.windows for r in w.rounds for p in r.participants)
    assert [len(w.participants) for w in record.windows] == [3, 3]
    for name, client in record.clients.items():
        steps = int(np.ceil(client.samples / 32))
        spent = client.privacy
        assert spent.dp_sgd == pytest.approx(epsilon_of([(1.0, 32 / client.samples, 2 * steps)], 1e-5)), name
        assert spent.update == pytest.approx(epsilon_of([(2.0, 1.0, 2)], 1e-5))
        assert spent.histogram == 1.0
    written = json.loads((tree.folder / "runs" / "private" / "report.json").read_text())
    assert [w["losses"] for w in written["windows"]] == [[None], [None]]


def test_stock_fedadam_at_the_cloud(tree: LiveTree) -> None:
    """A stock strategy in the cloud's place, unmodified: it sees two nodes, the edges, and the loss falls."""
    settings: Flat = {"learning-rate": 0.001, "warmup-steps": 0, "seed": 7}
    with serverapp_grid(tree.link, app_bundle("", config=flower_config(settings))) as grid:
        strategy = FedAdam(
            fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2, eta=0.003, tau=1e-3
        )
        result = strategy.start(TreeGrid(grid), initial_arrays(SMALL), num_rounds=3, timeout=120)
    losses = [float(result.train_metrics_clientapp[r]["loss"]) for r in (1, 2, 3)]  # type: ignore[arg-type]
    assert losses[-1] < 0.9 * losses[0]


BAD_CLIENT = textwrap.dedent(
    """
    \"\"\"A client of a tree that trains well, and signs and sends NaN for its update.\"\"\"
    import numpy as np
    from espalier_client import training
    from espalier_client.app import app
    from espalier.wire.sections import Payload

    pack = training.pack_reply

    def poisoned(device, plan, report, payload):
        bad = {
            section: {n: np.full_like(a, np.nan if a.dtype.kind == "f" else 0) for n, a in arrays.items()}
            for section, arrays in payload.views().items()
        }
        return pack(device, plan, report, Payload.fill(payload.layouts, bad))

    training.pack_reply = poisoned
    """
)


def test_bad_update_in_a_running_tree(tree: LiveTree, tmp_path: Path) -> None:
    """The sender is named, its update refused, and the round goes on with the others."""
    (tmp_path / "badclient.py").write_text(BAD_CLIENT)
    more = ["--app", "badclient:app"]
    with start_client(tree, "mallory", "digits:9/16", ["edge-1"], *more, PYTHONPATH=str(tmp_path)):
        run = tree.run("bad", method="fedavg", model="cnn", rounds=1, rg=1, min_edges=2, min_clients=4)
    [fault] = run.recorder.record.faults
    assert (fault.node, fault.kind, fault.window, fault.round) == ("mallory", "refused", 1, 1)
    assert "not finite" in fault.detail
    assert run.recorder.record.windows[0].participants == ["c0", "c1", "c2"]
    assert run.recorder.record.status == "finished"


def test_stop_file_ends_a_run_cleanly(tree: LiveTree) -> None:
    """What was made stays, the edges are free for the next run at once."""
    out = tree.folder / "runs" / "stopped"
    out.mkdir(parents=True)
    (out / "stop").touch()
    tree.run("stopped", method="fedavg", rounds=50, rg=1, sample_steps=2, sample_count=1)
    report = json.loads((out / "report.json").read_text())
    assert report["status"] == "stopped"
    run = tree.run("after", method="fedavg", rounds=1, rg=1, min_clients=3, sample_steps=2, sample_count=1)
    assert run.recorder.record.status == "finished"


def test_two_runs_do_not_mix(tree: LiveTree) -> None:
    """While an edge serves one run, another is told so."""
    with serverapp_grid(tree.link, app_bundle("")) as grid:
        names, keys = NameRegistry(tree.folder / "cloud" / "edges.json"), ClientKeys(tree.folder / "cloud")
        first = Tree(TreeGrid(grid), names, "first", 0.0, keys)
        second = Tree(TreeGrid(grid), names, "second", 0.0, keys)
        first.refresh()
        assert len(first.edges()) == 2
        second.refresh()
        assert second.edges() == {}
        with pytest.raises(EspalierError, match="edge-1 serves run first"):
            wait_for_members(second, RunConfig.from_flat({"hello-timeout": 0.1}), lambda: False)
        first.finish()
        second.refresh(all_edges=True)
        assert len(second.edges()) == 2
        second.finish()


def test_message_without_a_plan_and_unknown_type(tree: LiveTree) -> None:
    """A plain message whose clients all fail comes back as one clear error."""
    with serverapp_grid(tree.link, app_bundle("")) as plain:
        grid = TreeGrid(plain)
        node = next(iter(grid.get_node_ids()))
        content = RecordDict({"config": ConfigRecord({"x": 1}), "metrics": MetricRecord({"y": 1.0})})
        [reply] = grid.exchange([Message(content, node, "query.nobody_knows")], deadline=30)
        assert reply.has_error()
        reason = reply.error.reason or ""
        assert "none of them gave a usable reply" in reason
        assert "nobody_knows" in reason
