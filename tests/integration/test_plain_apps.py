"""An existing Flower app over the tree, with no line changed; and stock SuperNodes in our clients' place."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from bench.stock import SuperLink, environment, free_port, running, superlink, supernode, wait_until

from tests.support.paths import ROOT
from tests.support.tree import LiveTree, espalier, process_environment, start_client, start_edge

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "plainapp"
version = "1.0.0"
description = "A Flower app that knows nothing of Espalier"
license = "MIT"
dependencies = ["flwr>=1.39"]

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "plainapp.server_app:app"
clientapp = "plainapp.client_app:app"

[tool.flwr.app.config]
rounds = 2
step = 1.0
result = ""
"""

SERVER_APP = '''
"""Trains with Flower's FedAvg, evaluates, asks a question, and writes down what came of it."""
import json
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid, context):
    config = context.run_config
    strategy = FedAvg(min_train_nodes=2, min_evaluate_nodes=2, min_available_nodes=2)
    start = ArrayRecord({"w": Array(np.zeros(4, np.float32)), "layer.b": Array(np.ones((2, 2), np.float64))})
    result = strategy.start(grid, start, num_rounds=config["rounds"], timeout=60)
    question = [Message(RecordDict({"config": ConfigRecord({"x": 3})}), n, "query") for n in grid.get_node_ids()]
    answers = [dict(r.content["answer"]) for r in grid.send_and_receive(question, timeout=60) if r.has_content()]
    found = {
        "w": result.arrays["w"].numpy().tolist(),
        "b": result.arrays["layer.b"].numpy().tolist(),
        "train": {r: dict(m) for r, m in result.train_metrics_clientapp.items()},
        "evaluate": {r: dict(m) for r, m in result.evaluate_metrics_clientapp.items()},
        "answers": answers,
    }
    Path(config["result"]).write_text(json.dumps(found))
'''

CLIENT_APP = '''
"""Moves the weights by run_config["step"] * node_config["offset"]; counts its calls in its state."""
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    move = context.run_config["step"] * context.node_config["offset"]
    calls = context.state["calls"]["n"] + 1 if "calls" in context.state else 1
    context.state["calls"] = MetricRecord({"n": calls})
    arrays = {k: Array(a.numpy() + np.asarray(move, a.numpy().dtype)) for k, a in message.content["arrays"].items()}
    metrics = MetricRecord({"num-examples": context.node_config["examples"], "move": move, "calls": calls})
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message, context):
    mean = float(message.content["arrays"]["w"].numpy().mean()) + context.node_config["offset"]
    metrics = MetricRecord({"num-examples": context.node_config["examples"], "mean": mean})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@app.query()
def query(message, context):
    answer = ConfigRecord({"twice": 2 * message.content["config"]["x"], "step": context.run_config["step"]})
    return Message(RecordDict({"answer": answer}), reply_to=message)
'''


#: Name, edge, and what the node config says, of our clients.
RESIDENTS = (("a", "edge-1", 1.0, 10), ("b", "edge-1", 2.0, 30), ("c", "edge-2", 5.0, 20))


@pytest.fixture(scope="module")
def app_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("apps") / "plainapp"
    (folder / "plainapp").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "LICENSE").write_text("MIT")
    (folder / "README.md").write_text("# plainapp\n")
    (folder / "plainapp" / "__init__.py").write_text("")
    (folder / "plainapp" / "server_app.py").write_text(SERVER_APP)
    (folder / "plainapp" / "client_app.py").write_text(CLIENT_APP)
    return folder


@pytest.fixture(scope="module")
def tree(app_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveTree]:
    """Three resident clients and, below edge-2, one stock SuperNode, all with the user's app."""
    folder = tmp_path_factory.mktemp("plain")
    with ExitStack() as stack:
        more = ["--disable-runtime-dependency-installation"]
        link = stack.enter_context(superlink(folder / "link", isolation="subprocess", more=more))
        live = LiveTree(link, folder)
        for name in ("edge-1", "edge-2"):
            stack.enter_context(start_edge(live, name))
        for name, edge, offset, examples in RESIDENTS:
            config = f"offset={offset} examples={examples}"
            flags = ("--app", "plainapp.client_app:app", "--node-config", config)
            stack.enter_context(start_client(live, name, "", [edge], *flags, PYTHONPATH=str(app_folder)))
        stack.enter_context(
            supernode(folder / "stock", live.edges["edge-2"], "--node-config", "offset=9.0 examples=40")
        )

        def all_there() -> bool:
            return all("connected to" in live.log(e) for e in live.edges) and all(
                "connected to" in live.log(c) for c in "abc"
            )

        wait_until(all_there, 90, "the tree")
        wait_until(
            lambda: "SuperNode ID" in (folder / "stock" / "supernode.log").read_text(), 60, "the SuperNode"
        )
        yield live


def flwr_run(live: LiveTree, app_folder: Path, name: str, **config: object) -> dict[str, object]:
    """Submit the app with Flower's own CLI and return what its ServerApp wrote down."""
    home = live.folder / "user"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(f'[superlink.here]\naddress = "{live.link.api}"\ninsecure = true\n')
    result = live.folder / f"{name}.json"
    values = " ".join(f"{k}={json.dumps(v)}" for k, v in {"result": str(result), **config}.items())
    command = [
        str(Path(sys.executable).with_name("flwr")),
        "run",
        str(app_folder),
        "here",
        "--run-config",
        values,
    ]
    done = subprocess.run(
        command, env=environment(home), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

    def written() -> bool:
        return result.exists() and bool(result.read_text())

    wait_until(written, 180, f"{name}: {live.link.log}")
    return dict(json.loads(result.read_text()))


def test_any_flower_app_over_the_tree(tree: LiveTree, app_folder: Path) -> None:
    """The cloud's ServerApp sees two nodes; what it gets is what four flat clients would have given."""
    found = flwr_run(tree, app_folder, "first", step=0.5)
    # Moves .5, 1, 2.5, 4.5 weighted by 10, 30, 20, 40: a round moves by 2.65.
    move = (10 * 0.5 + 30 * 1 + 20 * 2.5 + 40 * 4.5) / 100
    assert found["w"] == pytest.approx([2 * move] * 4)
    assert found["b"] == [pytest.approx([1 + 2 * move] * 2)] * 2
    train = found["train"]
    assert isinstance(train, dict)
    assert train["1"]["move"] == pytest.approx(move)
    # Each client's state counts its calls, in our resident client as in the stock SuperNode.
    assert train["1"]["calls"] == pytest.approx(1)
    assert train["2"]["calls"] == pytest.approx(2)
    evaluate = found["evaluate"]
    assert isinstance(evaluate, dict)
    assert evaluate["1"]["mean"] == pytest.approx(move + (10 * 1 + 30 * 2 + 20 * 5 + 40 * 9) / 100)
    # Replies without num-examples pass because they are equal; two edges answer as two nodes.
    assert found["answers"] == [{"twice": 6, "step": 0.5}] * 2


def test_another_run_starts_at_once_and_anew(tree: LiveTree, app_folder: Path) -> None:
    """The edges serve the next run without a restart; its state starts empty and its config is its own."""
    found = flwr_run(tree, app_folder, "second", step=2.0, rounds=1)
    move = 2 * (10 * 1 + 30 * 2 + 20 * 5 + 40 * 9) / 100
    assert found["w"] == pytest.approx([move] * 4)
    train = found["train"]
    assert isinstance(train, dict)
    assert train["1"]["calls"] == pytest.approx(1)


def test_stock_supernode_below_an_edge_with_our_app(tmp_path: Path) -> None:
    """Espalier's whole run by its own commands, with one stock flower-supernode among the clients.

    The edge serves our app's bundle, the SuperNode installs and runs it.
    """
    env = process_environment(tmp_path, XDG_STATE_HOME=str(tmp_path / "xdg"))
    ports = [free_port(), free_port()]
    out = tmp_path / "run"
    with ExitStack() as stack:
        flags = ["--listen", f"127.0.0.1:{ports[0]}", "--control", f"127.0.0.1:{ports[1]}"]
        command = espalier("cloud", "--name", "t", "--state", str(tmp_path / "cloud"), *flags)
        cloud = stack.enter_context(running(command, tmp_path / "cloud.log", env))
        wait_until(lambda: "is ready" in (tmp_path / "cloud.log").read_text(), 90, "the cloud")
        link = SuperLink(f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}", cloud.pid, tmp_path / "cloud.log")
        live = LiveTree(link, tmp_path)
        stack.enter_context(start_edge(live, "edge-1"))
        stack.enter_context(start_client(live, "resident", "digits:0/16", ["edge-1"]))
        config = f'name="stock" data="digits:1/16" state="{tmp_path / "stock-state"}"'
        stack.enter_context(supernode(tmp_path / "stock", live.edges["edge-1"], "--node-config", config))
        settings = {
            "method": "fedphd",
            "rounds": 2,
            "rg": 1,
            "prune-at": 1,
            "min-clients": 2,
            "sample-steps": 2,
            "sample-count": 4,
            "require-signatures": "false",
            # A SuperNode starts a process for every message, as slowly as the machine is busy.
            "adaptive-deadline": "false",
        }
        chosen = [word for k, v in settings.items() for word in ("-c", f"{k}={v}")]
        command = espalier("run", "--cloud", "t", "--out", str(out), *chosen)
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=280, check=False, cwd=ROOT
        )
        assert done.returncode == 0, done.stdout + done.stderr
        report = json.loads((out / "report.json").read_text())
        assert report["status"] == "finished"
        assert [w["participants"] for w in report["windows"]] == [["resident", "stock"]] * 2
        assert report["faults"] == []
        # A SuperNode without a key file has none to sign with; it is let in and listed.
        assert [w["signatures"]["unsigned"] for w in report["windows"]] == [["stock"]] * 2
        assert [w["signatures"]["cloud"] for w in report["windows"]] == [1] * 2
        assert report["model"]["params"] < report["model"]["params_dense"]
        # Also the SuperNode's app keeps its optimiser state between rounds, on disk.
        assert list((tmp_path / "stock-state" / "rounds").rglob("*.safetensors"))
    grid = tmp_path / "grid.png"
    command = espalier("sample", str(out / "model"), "--count", "4", "--steps", "2", "--out", str(grid))
    assert subprocess.run(command, env=env, timeout=120, check=False).returncode == 0
    assert grid.stat().st_size > 500
    (out / "report.html").unlink()
    assert subprocess.run(espalier("report", str(out)), env=env, timeout=60, check=False).returncode == 0
    assert (out / "report.html").stat().st_size > 5000
