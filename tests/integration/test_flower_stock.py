"""Beside Flower's own processes: our node at a stock SuperLink, a stock SuperNode at our server, and TreeGrid."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from espalier.flower.arrays import numpy_view
from espalier.flower.resident import Upstream
from espalier_server.superlink.grid import TreeGrid
from tests.support.flower_helpers import empty, fleet, online, resident, weights
from tests.support.paths import ROOT
from tests.support.processes import SuperLink, app_bundle, serverapp_grid, superlink, supernode, wait_until
from tests.support.resident_process import app

CLIENT = """
import os
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    seen = ConfigRecord({"lr": context.run_config["lr"], "site": context.node_config["site"], "pid": os.getpid()})
    content = RecordDict({"w": message.content["w"], "m": MetricRecord({"num-examples": 1}), "seen": seen})
    return Message(content, reply_to=message)
"""


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    with superlink(tmp_path_factory.mktemp("superlink")) as running:
        yield running


@pytest.fixture(scope="module")
def bundle() -> Any:
    return app_bundle(CLIENT, config='lr = 0.1\nname = "tiny"\n')


def to(nodes: list[int], size: int = 256, **do: Any) -> list[Message]:
    content = RecordDict({"w": weights(size), "do": ConfigRecord(do)})
    return [Message(content, node, "train") for node in nodes]


def join(grid: Grid, count: int) -> list[int]:
    wait_until(lambda: len(list(grid.get_node_ids())) == count, 30, f"{count} nodes")
    return sorted(grid.get_node_ids())


def test_resident_nodes_at_a_stock_superlink(tmp_path: Path, link: SuperLink, bundle: Any) -> None:
    with (
        serverapp_grid(link, bundle, {"lr": 0.5}) as http,
        resident(app, tmp_path / "a", link.fleet) as a,
        resident(app, tmp_path / "b", link.fleet),
    ):
        grid = TreeGrid(http)
        nodes = join(grid, 2)
        replies = list(grid.exchange(to(nodes, 3_000_000), deadline=60))
        assert sorted(reply.metadata.src_node_id for reply in replies) == nodes
        for reply in replies:
            np.testing.assert_array_equal(numpy_view(reply.content.array_records["w"]["flat"])[:9], 2)
            assert json.loads(str(reply.content["seen"]["run_config"])) == {"lr": 0.5, "name": "tiny"}
        run_id = grid.run.run_id
        upstream = Upstream(link.fleet, insecure=True)
        fab = a.fetch_fab(upstream, run_id)
        assert fab is not None
        assert fab.content == bundle.content
        assert a.run_config(upstream, run_id) == {"lr": 0.5, "name": "tiny"}
        (failed,) = grid.exchange(to(nodes[:1], fail=True), deadline=30)
        assert failed.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION


def test_deadline_quorum_and_late_replies_at_a_stock_superlink(
    tmp_path: Path, link: SuperLink, bundle: Any
) -> None:
    with (
        serverapp_grid(link, bundle) as http,
        resident(app, tmp_path / "a", link.fleet),
        resident(app, tmp_path / "b", link.fleet),
    ):
        grid = TreeGrid(http)
        nodes = join(grid, 2)
        list(grid.exchange(to(nodes), deadline=30))
        began = time.monotonic()
        replies = list(grid.exchange(to(nodes[:1]) + to(nodes[1:], sleep=6), deadline=30, quorum=1, grace=2))
        assert [reply.metadata.src_node_id for reply in replies] == nodes[:1]
        assert time.monotonic() - began < 5.5
        assert (grid.abandoned, grid.late) == (1, 0)
        wait_until(lambda: grid.collect_late() == 1, 20, "the late reply")
        assert (grid.abandoned, grid.late) == (1, 1)
        assert grid.collect_late() == 0
        assert list(grid.exchange(to(nodes, sleep=2), deadline=0.6)) == []
        assert grid.abandoned == 3
        (gone,) = grid.exchange(to([4711]), deadline=10)
        assert gone.error.code == ErrorCode.NODE_UNAVAILABLE


def test_a_stock_strategy_over_treegrid(tmp_path: Path, link: SuperLink, bundle: Any) -> None:
    def fit(message: Message, context: Any) -> Message:
        values = ArrayRecord({"flat": message.content.array_records["arrays"]["flat"]})
        content = RecordDict({"arrays": values, "metrics": MetricRecord({"num-examples": 2, "loss": 0.5})})
        return Message(content, reply_to=message)

    with (
        serverapp_grid(link, bundle) as http,
        resident(fit, tmp_path / "a", link.fleet),
        resident(fit, tmp_path / "b", link.fleet),
    ):
        grid = TreeGrid(http)
        join(grid, 2)
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=2)
        began = time.monotonic()
        result = strategy.start(grid, initial_arrays=weights(), num_rounds=2, timeout=30)
        assert [metrics["loss"] for metrics in result.train_metrics_clientapp.values()] == [0.5, 0.5]
        assert time.monotonic() - began < 12  # stock: 3 s of sleep a round at least, after the replies


def test_treegrid_wraps_nothing_else() -> None:
    with fleet() as server, pytest.raises(TypeError, match="InlineGrid"):
        TreeGrid(server.open_run())


def test_a_stock_supernode_at_the_inline_server(tmp_path: Path, bundle: Any) -> None:
    with fleet() as server:
        grid = server.open_run(fab=bundle, run_config={"lr": 0.7})
        with supernode(tmp_path, f"127.0.0.1:{server.port}", "--node-config", "site='attic'") as process:
            nodes = online(server, 1, 60)
            for size in (256, 3_000_000):
                message = grid.create_message(RecordDict({"w": weights(size)}), "train", nodes[0], "1")
                (reply,) = grid.exchange([message], deadline=120)
                assert reply.has_content(), (reply, (tmp_path / "supernode.log").read_text()[-3000:])
                assert (reply.content["seen"]["lr"], reply.content["seen"]["site"]) == (0.7, "attic")
                assert len(numpy_view(reply.content.array_records["w"]["flat"])) == size
            assert empty(server)
            assert psutil.Process(process.pid).children()


def test_the_package_needs_no_torch() -> None:
    modules = "espalier_edge.fleet.server, espalier.flower.resident, espalier_server.superlink.grid"
    code = f"import {modules}, sys; print('torch' in sys.modules)"
    root = ROOT
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout == "False\n"
