"""Methods over real processes: the links change nothing, axes compose, state moves along, bad input is named."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from bench.local_tree import LocalClient, LocalTree
from bench.stock import wait_until

from espalier.methods.cfl import MEMBERSHIP
from espalier_server.records.record import RunRecord
from espalier_server.run import TreeRun
from tests.support.tree import LiveTree, espalier, live_tree, process_environment, start_client

pytestmark = pytest.mark.usefixtures("one_thread")

Flat = dict[str, bool | int | float | str]

#: Sizes that the first two devices were set to by hand; the others take the largest that suits their memory.
LEVELS = (0.25, 0.5)
#: 28 images a client, so two optimiser steps a round.
DATA = "digits:{i}/64"
SHORT: Flat = {"rounds": 2, "rg": 1, "min-edges": 2, "min-clients": 4, "seed": 11, "batch-size": 16}
DIFFUSION: Flat = {"model": "unet-tiny", "sample-steps": 2, "sample-count": 1, "eval-samples": 2}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveTree]:
    with live_tree(tmp_path_factory.mktemp("live"), data=DATA, levels=LEVELS) as live:
        yield live


def local_tree(folder: Path, more: Mapping[str, str] | None = None) -> LocalTree:
    """Return the live tree's twin in this process, with further clients by name if wanted."""
    clients = [
        LocalClient(f"c{i}", DATA.format(i=i), (0, 1), {"level": LEVELS[i]} if i < len(LEVELS) else None)
        for i in range(4)
    ]
    clients += [LocalClient(name, data, (0, 1)) for name, data in (more or {}).items()]
    return LocalTree(folder, clients, 2)


def live_run(tree: LiveTree, name: str, settings: Flat) -> TreeRun:
    """Run to the end and make sure that nothing went wrong on the way."""
    run = tree.run_flat(name, settings)
    check_clean(run.recorder.record)
    return run


def check_clean(record: RunRecord) -> None:
    assert (record.status, record.faults) == ("finished", [])
    for entry in (entry for window in record.windows for entry in window.rounds):
        assert entry.loss is not None
        assert np.isfinite(entry.loss)


def norm(tensors: Mapping[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(v, dtype=np.float64)) for v in tensors.values())))


def apart(a: TreeRun, b: TreeRun) -> float:
    """Return the distance of all that two clouds hold, as a share of its norm."""
    assert a.state is not None
    assert b.state is not None
    one, other = (
        {f"{s} {n}": v for s, arrays in state.payload.views().items() for n, v in arrays.items()}
        for state in (a.state, b.state)
    )
    assert one.keys() == other.keys()
    return norm({n: one[n].astype(np.float64) - other[n] for n in one}) / norm(other)


# --- the links change nothing ----------------------------------------------------------------------

SAME: dict[str, Flat] = {
    "scaffold": {"model": "cnn"},
    "heterofl": {"model": "cnn-bn", "level-choice": "device"},
    "ifca": {"model": "cnn"},
    "fedpaq": {"model": "cnn"},
    "feddiffuse": {**DIFFUSION, "exchange": "udec"},
    "cfl": {"model": "cnn", "cfl-from-round": 1, "cfl-mean-norm": 100.0, "cfl-max-norm": 1e-9},
}


@pytest.mark.parametrize("method", SAME)
def test_a_live_run_equals_one_without_links(tree: LiveTree, tmp_path: Path, method: str) -> None:
    settings: Flat = {**SHORT, **SAME[method], "method": method}
    live = live_run(tree, f"same-{method}", settings)
    local = local_tree(tmp_path).run("local", settings)
    check_clean(local.recorder.record)
    assert apart(live, local) <= 1e-5
    assert live.state is not None
    assert local.state is not None
    assert live.state.memory.keys() == local.state.memory.keys()
    for section, arrays in local.state.memory.items():
        assert live.state.memory[section].keys() == arrays.keys()
        for name, value in arrays.items():
            np.testing.assert_array_equal(
                live.state.memory[section][name], value, err_msg=f"{section} {name}"
            )
    if method == "cfl":  # it has split, and alike
        assert len({int(v[0]) for v in live.state.memory[MEMBERSHIP].values()}) > 1


# --- axes compose ----------------------------------------------------------------------------------

#: Settings, and the largest share that the bytes up may have of those down.
#: Power-of-Choice asks everybody with the whole model, so two of six messages down are answered by an update.
COMPOSED: dict[str, tuple[Flat, float]] = {
    "fedphd+qsgd+pow-d": ({**DIFFUSION, "codec": "qsgd", "selection": "pow-d", "fraction": 0.5}, 0.13 / 3),
    "fedphd+shape": ({**DIFFUSION, "edge-choice": "shape"}, 1.02),
    "scaffold+qsgd": ({"model": "cnn", "codec": "qsgd"}, 0.14 / 2),  # c comes down beside the model
    "feddyn+pow-d": ({"model": "cnn", "selection": "pow-d", "fraction": 0.5}, 1.02 / 3),
    "heterofl+qsgd": ({"model": "cnn-bn", "codec": "qsgd"}, 0.14),
    "fedprox+divfl": ({"model": "cnn", "selection": "divfl", "fraction": 0.5, "rg": 1}, 2.05),
    "moon+fp16": ({"model": "cnn", "codec": "fp16"}, 0.51),
    "depthfl+top-k": ({"model": "depth-cnn", "levels": "1,0.67,0.34", "codec": "top-k"}, 0.13),
    "ifca+pow-d": ({"model": "cnn", "selection": "pow-d", "fraction": 0.5}, 0.51 / 3),  # one model of two
    "qfedavg+bf16": ({"model": "cnn", "codec": "bf16", "selection": "uniform"}, 0.51),
    # Bases so small that reports and signatures weigh: 400 bytes of 2,000. The layouts of sections are shorter than
    # the tensor names were, so that the same 16.6 kB up stand against 107 kB down, not 113.
    "split-mix+qsgd": ({"model": "cnn", "codec": "qsgd", "base-width": 0.25}, 0.158),
}


@pytest.mark.parametrize("pair", COMPOSED)
def test_axes_compose(tree: LiveTree, pair: str) -> None:
    """Two rounds in one window, so that edges step and choose by themselves, too."""
    more, share = COMPOSED[pair]
    settings: Flat = {**SHORT, "rg": 2, **more, "method": pair.partition("+")[0]}
    run = live_run(tree, pair.replace("+", "-"), settings)
    links = run.recorder.record.links["client-edge"]
    assert 0 < links.up_bytes <= share * links.down_bytes
    trained = [len(r.participants) for w in run.recorder.record.windows for r in w.rounds]
    assert trained == ([2, 2] if settings.get("fraction") == 0.5 else [4, 4])


# --- a client's own state --------------------------------------------------------------------------


class Wanderer:
    """A client that is ended and started again."""

    def __init__(self, tree: LiveTree, name: str, data: str) -> None:
        self.tree, self.name, self.data = tree, name, data
        self.process = ExitStack()
        self.pid = 0

    def start(self, edges: list[str]) -> None:
        """Start it and wait until it is connected."""
        before = self._connections()
        self.pid = self.process.enter_context(start_client(self.tree, self.name, self.data, edges))
        wait_until(lambda: self._connections() >= before + len(edges), 60, self.name)

    def end(self, number: signal.Signals) -> None:
        """Signal it and wait until it is gone."""
        os.kill(self.pid, number)
        self.process.close()

    def _connections(self) -> int:
        log = self.tree.folder / f"{self.name}.log"
        return log.read_text().count("connected to") if log.exists() else 0

    # --- between two windows -----------------------------------------------------------------------

    def crash(self, run: TreeRun) -> None:
        """Be killed, and come back."""
        self.end(signal.SIGKILL)
        self.start(list(self.tree.edges))

    def move(self, run: TreeRun) -> None:
        """Come back with the other edge only."""
        rounds = run.recorder.record.windows[-1].rounds
        [edge] = [p.edge for r in rounds for p in r.participants if p.client == self.name]
        [other] = [e for e in self.tree.edges if e != edge]
        self.end(signal.SIGTERM)
        self.start([other])

        def moved() -> bool:
            run.tree.refresh(all_edges=True)
            return [m.edges for m in run.tree.members() if m.name == self.name] == [(other,)]

        wait_until(moved, 60, "the move")


#: What happens after the first window and after the second, and settings under which what a client keeps counts.
STATEFUL: dict[str, tuple[tuple[str, str], Flat]] = {
    "scaffold": (("crash", "move"), {}),
    "feddyn": (("", "crash"), {"dyn-alpha": 1.0}),
    "moon": (("", "move"), {"learning-rate": 0.1, "moon-mu": 5.0}),
}


class TestStateOfAClient:
    """A client that is killed, or goes to another edge, in the middle of a run goes on where it was."""

    @pytest.fixture(scope="class")
    def wanderer(self, tree: LiveTree) -> Iterator[Wanderer]:
        wanderer = Wanderer(tree, "d0", DATA.format(i=9))
        wanderer.start(list(tree.edges))
        with wanderer.process:
            yield wanderer

    @pytest.mark.parametrize("method", STATEFUL)
    def test_the_model_is_that_of_an_unbroken_run(
        self, tree: LiveTree, wanderer: Wanderer, tmp_path: Path, method: str
    ) -> None:
        happens, more = STATEFUL[method]
        settings: Flat = {**SHORT, "rounds": 3, "min-clients": 5, "method": method, "model": "cnn", **more}

        def between(run: TreeRun) -> None:
            for window, what in enumerate(happens, 1):
                if what and run.recorder.record.windows[-1].window == window:
                    getattr(wanderer, what)(run)

        broken = tree.run_flat(f"state-{method}", settings, between)
        check_clean(broken.recorder.record)
        whole = local_tree(tmp_path / "whole", {wanderer.name: wanderer.data}).run("whole", settings)
        assert apart(broken, whole) <= 1e-5
        # And the state matters: a twin that loses it between windows ends elsewhere.
        forgetful = local_tree(tmp_path / "forgetful", {wanderer.name: wanderer.data})
        forgetful.run("r", {**settings, "rounds": 2})
        shutil.rmtree(tmp_path / "forgetful" / "clients" / wanderer.name)
        assert apart(forgetful.run("r", settings), whole) > 1e-4


# --- bad input -------------------------------------------------------------------------------------

BAD_CLIENT = textwrap.dedent(
    """
    \"\"\"A client of a tree that goes wrong in the way that the run's name says.\"\"\"
    from flwr.app import Message
    from flwr.clientapp import ClientApp
    from espalier_client import app as ours
    from espalier_client import training
    from espalier_client.device import Device
    from espalier.wire import control

    app = ClientApp()
    app.query("espalier_inquiry")(ours.inquire)
    app.train()(ours.train)
    pack = training.pack_reply

    @app.query("espalier_hello")
    def hello(message, context):
        answer = Device.from_node_config(context.node_config).hello("r", 0.0)
        if message.content["config"]["run"] == "bad-level":
            answer.level = 7.0
        return Message(control.control_content(answer), reply_to=message)

    def misleading(device, plan, report, payload):
        \"\"\"Sign what does not fit.\"\"\"
        if report.run == "bad-cluster":
            report.metrics["cluster"] = 9
        if report.run == "bad-shapes":
            section = report.sections.add(name="model")
            section.layout.tensors.extend(plan.architecture.tensors)
            section.layout.tensors[0].shape[0] *= 2
        return pack(device, plan, report, payload)

    training.pack_reply = misleading
    """
)

BAD: dict[str, tuple[Flat, str]] = {
    "bad-level": ({"method": "heterofl", "model": "cnn-bn"}, "the level 7, expected a share"),
    "bad-cluster": ({"method": "ifca", "model": "cnn"}, "cluster 9 of 2"),
    "bad-shapes": (
        {"method": "heterofl", "model": "cnn-bn"},
        "float32[8, 1, 3, 3], expected float32[4, 1, 3, 3]",
    ),
}


class TestBadInput:
    """The sender is named, and the others' round goes on without it."""

    @pytest.fixture(scope="class")
    def mallory(self, tree: LiveTree, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        folder = tmp_path_factory.mktemp("app")
        (folder / "badclient.py").write_text(BAD_CLIENT)
        more, edges = ["--app", "badclient:app"], list(tree.edges)
        with start_client(tree, "mallory", DATA.format(i=8), edges, *more, PYTHONPATH=str(folder)):
            wait_until(lambda: tree.log("mallory").count("connected to") == 2, 60, "mallory")
            yield

    @pytest.mark.usefixtures("mallory")
    @pytest.mark.parametrize("name", BAD)
    def test_what_does_not_fit_is_refused_by_name(self, tree: LiveTree, name: str) -> None:
        more, words = BAD[name]
        record = tree.run_flat(name, {**SHORT, "rounds": 1, **more}).recorder.record
        assert record.status == "finished"
        assert {(f.node, f.kind) for f in record.faults} == {("mallory", "refused")}
        assert [f.detail for f in record.faults if words not in f.detail] == []
        assert record.windows[0].participants == ["c0", "c1", "c2", "c3"]


def test_a_device_below_every_level_is_left_out(tree: LiveTree) -> None:
    """c0 was set to a quarter, and the run's smallest sub-model is a half."""
    settings: Flat = {**SHORT, "rounds": 1, "min-clients": 3, "method": "heterofl", "model": "cnn-bn"}
    run = tree.run_flat("too-small", {**settings, "levels": "1,0.5", "level-choice": "device"})
    [fault] = run.recorder.record.faults
    assert (fault.node, fault.kind) == ("c0", "refused")
    assert "level 0.25 is below the smallest of levels (0.5)" in fault.detail
    assert run.recorder.record.status == "finished"
    assert run.recorder.record.windows[0].participants == ["c1", "c2", "c3"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["method=scaffold", "model=cnn", "optimizer=adam"], ["optimizer:", "scaffold", "sgd"]),
        (["method=cfl", "model=cnn", "codec=qsgd", "fraction=0.5"], ["codec:", "fraction:", "cfl"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_what_cannot_be_combined_fails_before_anything_starts(
    tmp_path: Path, settings: list[str], words: list[str]
) -> None:
    out = tmp_path / "run"
    command = espalier("run", "--out", str(out))
    for setting in settings:
        command += ["-c", setting]
    done = subprocess.run(
        command, env=process_environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: run configuration")
    assert all(word in done.stderr for word in words)
    assert not out.exists()
