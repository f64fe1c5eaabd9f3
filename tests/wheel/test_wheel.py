"""The wheel in fresh environments: the base runs an edge, each extra its tier, and a tree of the three trains."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from bench.stock import free_port, running, wait_until
from PIL import Image

from tests.wheel.environments import Environment, build_wheel, install_base, install_extra

PACKAGES = {"espalier", "espalier_client", "espalier_edge", "espalier_proto", "espalier_server"}
#: Bytes that an edge's environment may have.
BASE_LIMIT = 300e6
#: Settings of a run of seconds.
TINY = {"method": "fedavg", "model": "cnn", "rounds": 1, "rg": 1, "batch-size": 4}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return install_base(tmp_path_factory.mktemp("base"), wheel)


@pytest.fixture(scope="session")
def client(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return install_extra(tmp_path_factory.mktemp("client"), wheel, "client")


@pytest.fixture(scope="session")
def cloud(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return install_extra(tmp_path_factory.mktemp("cloud"), wheel, "cloud")


def surroundings(folder: Path) -> dict[str, str]:
    """Return the variables of a user's shell in `folder`: nothing of this environment or of the checkout."""
    keep = {name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ}
    own = {"HOME": str(folder), "XDG_STATE_HOME": str(folder / "xdg"), "OMP_NUM_THREADS": "1"}
    return keep | own | {"PATH": os.defpath, "COLUMNS": "200"}


def run(
    environment: Environment, folder: Path, *words: str, limit: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run `espalier` in an empty folder."""
    return subprocess.run(
        environment.command(*words),
        cwd=folder,
        env=surroundings(folder),
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )


# --- what is in it -------------------------------------------------------------------------------------


def test_every_name_that_it_takes_is_ours(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        app = archive.getinfo("espalier_server/flower_app/pyproject.toml")
    assert wheel.name.startswith("espalier_fl-")
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert app.file_size < 10_000


# --- the base ------------------------------------------------------------------------------------------


def test_an_edges_environment_is_small_and_has_no_torch(base: Environment) -> None:
    assert base.size() <= BASE_LIMIT
    program = (
        "import importlib.util as u; print([m for m in ('torch', 'PIL', 'diffusers') if u.find_spec(m)])"
    )
    done = subprocess.run([str(base.python), "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["cloud", "--state", "s"], "cloud"),
        (["client", "--name", "c", "--edge", "127.0.0.1:1", "--state", "s", "--data", "photos"], "client"),
        (["demo"], "cloud"),
        (["run", "--out", "r"], "cloud"),
        (["sample", "model"], "cloud"),
        (["report", "r"], "cloud"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_a_command_of_another_tier_says_what_to_install(
    base: Environment, tmp_path: Path, words: list[str], extra: str
) -> None:
    done = run(base, tmp_path, *words)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert f"pip install 'espalier-fl[{extra}]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_clients_environment_does_not_run_the_cloud(client: Environment, tmp_path: Path) -> None:
    done = run(client, tmp_path, "cloud", "--state", "s")
    assert done.returncode == 2, done.stderr
    assert "torch-pruning" in done.stderr
    assert "torchvision" not in done.stderr
    assert "pip install 'espalier-fl[cloud]'" in done.stderr


# --- a tree of three environments ----------------------------------------------------------------------


class Tree:
    """A cloud, an edge and clients, each in the environment of its own tier."""

    def __init__(self, folder: Path, base: Environment, client: Environment, cloud: Environment) -> None:
        self.folder, self.base, self.client, self.cloud = folder, base, client, cloud
        self.edge = ""

    def log(self, name: str) -> str:
        """Return what a process printed."""
        return (self.folder / f"{name}.log").read_text()

    def start(
        self, stack: ExitStack, name: str, environment: Environment, *words: str, cwd: Path = Path()
    ) -> None:
        """Start a process, in the tree's folder unless `cwd` names another one; `stack` ends it."""
        command = environment.command(*words, "--state", str(self.folder / name))
        command = ["env", "--chdir", str(self.folder / cwd), *command]
        stack.enter_context(running(command, self.folder / f"{name}.log", surroundings(self.folder)))


def make_photos(folder: Path, seed: int) -> Path:
    """Write a few small grey images of two classes."""
    rng = np.random.default_rng(seed)
    for name, brightness in (("dark", 60), ("light", 190)):
        (folder / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.normal(brightness, 20, (8, 8)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def tree(
    base: Environment, client: Environment, cloud: Environment, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tree]:
    folder = tmp_path_factory.mktemp("tree")
    made = Tree(folder, base, client, cloud)
    fleet, control = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        made.start(
            stack, "cloud", cloud, "cloud", "--listen", fleet, "--control", control, "--monitor", "none"
        )
        edge = ["edge", "--name", "edge", "--cloud", fleet, "--listen", "127.0.0.1:0"]
        made.start(stack, "edge", base, *edge)
        address = folder / "edge" / "address"
        wait_until(lambda: address.exists() and address.read_text().endswith("\n"), 90, "the edge")
        made.edge = address.read_text().strip()
        wait_until(lambda: "is ready" in made.log("cloud"), 90, "the cloud")
        yield made


def test_an_edge_serves_in_the_base(tree: Tree, base: Environment, tmp_path: Path) -> None:
    done = run(base, tmp_path, "health", tree.edge)
    assert (done.returncode, done.stdout) == (0, f"{tree.edge} is serving\n"), done.stderr


def test_a_run_over_three_environments(tree: Tree, cloud: Environment) -> None:
    with ExitStack() as stack:
        for number in range(2):
            photos = make_photos(tree.folder / f"photos-{number}", number)
            words = ["client", "--name", f"c{number}", "--edge", tree.edge, "--data", str(photos)]
            tree.start(stack, f"c{number}", tree.client, *words)
        eval_data = tree.folder / "photos-eval"
        for part in ("train", "test"):
            make_photos(eval_data / part, 9)
        settings = {**TINY, "eval-data": str(eval_data), "min-clients": 2}
        chosen = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        done = run(cloud, tree.folder, "run", "--out", "r", *chosen, limit=240)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tree.folder / "r" / "report.json").read_text())
    assert report["status"] == "finished"
    assert report["windows"][0]["participants"] == ["c0", "c1"]
    assert (tree.folder / "r" / "report.html").exists()


CLIENT = """
from flwr.app import Message
from flwr.clientapp import ClientApp

import common
import proto
import server
import utils

app = ClientApp()
print("names:", common.NAME, proto.NAME, server.NAME, utils.NAME, flush=True)
"""


def test_a_users_app_whose_modules_have_common_names(tree: Tree, base: Environment, tmp_path: Path) -> None:
    """It needs the base alone, because it imports neither torch nor what is built on it."""
    (tmp_path / "client.py").write_text(CLIENT)
    for name in ("common", "proto", "server", "utils"):
        (tmp_path / f"{name}.py").write_text(f"NAME = {name!r}\n")
    with ExitStack() as stack:
        words = ["client", "--name", "own", "--edge", tree.edge, "--app", "client:app"]
        tree.start(stack, "own", base, *words, cwd=tmp_path)
        wait_until(lambda: "connected to" in tree.log("own"), 60, "the client")
        assert "names: common proto server utils" in tree.log("own")


def test_a_demonstration_from_an_empty_folder(cloud: Environment, tmp_path: Path) -> None:
    chosen = [word for key, value in TINY.items() for word in ("-c", f"{key}={value}")]
    done = run(cloud, tmp_path, "demo", "--edges", "1", "--clients", "1", *chosen, limit=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "demo" / "report.html").exists()
