"""The distribution's metadata: from a wheel as from a checkout installed in editable mode."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from espalier import distribution
from tests.support.paths import ROOT

METADATA = """\
Metadata-Version: 2.4
Name: espalier-fl
Version: 7.8.9
Requires-Dist: flwr==1.39.*
Requires-Dist: numpy<3,>=2
Provides-Extra: client
Requires-Dist: torch>=2.13; extra == 'client'
Provides-Extra: cloud
Requires-Dist: espalier-fl[client]; extra == 'cloud'
Requires-Dist: jinja2>=3.1; extra == 'cloud'
"""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Forget what was read before and after each test."""
    for function in (distribution.requirements, distribution._checkout):
        function.cache_clear()
    yield
    for function in (distribution.requirements, distribution._checkout):
        function.cache_clear()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an installed wheel's metadata that are found before this environment's."""
    folder = tmp_path / "espalier_fl-7.8.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(METADATA)
    (folder / "entry_points.txt").write_text("[espalier.commands]\nb = m:b\na = m:a\n[other]\nc = m:c\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return folder


def test_a_wheels_requirements(wheel: Path) -> None:
    assert distribution.version() == "7.8.9"
    assert distribution.extras() == ("client", "cloud")
    assert [r.name for r in distribution.requirements()] == ["flwr", "numpy"]
    assert [r.name for r in distribution.requirements("client")] == ["torch"]
    assert [r.name for r in distribution.requirements("cloud")] == ["torch", "jinja2"]


def test_a_wheels_entry_points(wheel: Path) -> None:
    assert [p.value for p in distribution.entry_points("espalier.commands") if p.value.startswith("m:")] == [
        "m:a",
        "m:b",
    ]


def test_others_contribute_but_do_not_replace(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plugin-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.4\nName: plugin\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[espalier.commands]\na = plugin:a\nzz = plugin:z\n")
    importlib.invalidate_caches()
    found = {p.name: p.value for p in distribution.entry_points("espalier.commands")}
    assert (found["a"], found["zz"]) == ("m:a", "plugin:z")


def test_a_checkout_is_read_as_it_is_now(wheel: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "a checkout"
    checkout.mkdir()
    table = '[project]\nname = "espalier-fl"\ndependencies = ["flwr"]\n[project.optional-dependencies]\nsd = ["x>1"]\n'
    (checkout / "pyproject.toml").write_text(
        table + '[project.entry-points."espalier.commands"]\nnew = "m:new"\n'
    )
    source = {"url": checkout.as_uri(), "dir_info": {"editable": True}}
    (wheel / "direct_url.json").write_text(json.dumps(source))
    assert [str(r) for r in distribution.requirements("sd")] == ["x>1"]
    assert {p.name: p.value for p in distribution.entry_points("espalier.commands")}["new"] == "m:new"


def test_every_entry_point_can_be_loaded() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for group, points in project["entry-points"].items():
        for name, value in points.items():
            assert importlib.metadata.EntryPoint(name, value, group).load()


def test_the_flower_app_has_the_distributions_name_and_version() -> None:
    from espalier_server import FLOWER_APP

    app = tomllib.loads((FLOWER_APP / "pyproject.toml").read_text())["project"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (app["name"], app["version"]) == (project["name"], project["version"])
