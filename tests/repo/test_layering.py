"""The rules between packages: imports run one way, Flower's internals stay in the adapter, edges need no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

TIERS = ("client", "edge", "server")
#: The folders that may touch what Flower does not offer publicly.
ADAPTERS = ("common/espalier/flower", "edge/espalier_edge/fleet", "server/espalier_server/superlink")
#: What Flower offers publicly: everything else is an internal.
PUBLIC = {
    "flwr.app",
    "flwr.clientapp",
    "flwr.serverapp",
    "flwr.serverapp.strategy",
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("package", ["common", *TIERS])
def test_imports_run_one_way(package: str) -> None:
    """Common imports no tier, and no tier another one."""
    forbidden = {t for t in TIERS if t != package}
    allowed = {("common/espalier/commands/tiers.py", t) for t in TIERS}
    for path in modules(package):
        for name in imports(path):
            top = name.split(".")[0].removeprefix("espalier_")
            where = (path.relative_to(ROOT).as_posix(), top)
            assert top not in forbidden or where in allowed, f"{where[0]} imports {name}"


@pytest.mark.parametrize("package", ["common", *TIERS])
def test_flowers_internals_stay_in_the_adapter(package: str) -> None:
    for path in modules(package):
        if any(path.is_relative_to(ROOT / adapter) for adapter in ADAPTERS):
            continue
        for name in imports(path):
            assert name.split(".")[0] != "flwr" or name in PUBLIC, f"{path.relative_to(ROOT)} imports {name}"


def test_every_module_says_why_it_exists() -> None:
    for package in ("common", "bench", *TIERS):
        for path in modules(package):
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no docstring"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("espalier_server.commands.demo", ["flwr", "torch"]),
        ("espalier_edge.service", ["torch", "torch_pruning", "diffusers", "sklearn"]),
        (
            "espalier_client.service, espalier_client.app",
            [
                "torch_pruning",
                "sklearn",
                "torchmetrics",
                "matplotlib",
                "diffusers",
                "torchvision",
                "flwr_datasets",
            ],
        ),
        (
            "espalier_server.superlink.supervisor",
            ["torch", "torchvision", "diffusers", "sqlalchemy", "matplotlib"],
        ),
        ("espalier_server.app", ["torch_pruning", "sklearn", "torchmetrics", "torchvision", "flwr_datasets"]),
    ],
)
def test_a_process_imports_only_what_its_tier_needs(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print(' '.join(m for m in {absent!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


def test_an_edge_makes_methods_without_torch() -> None:
    code = """
import sys
import espalier_edge.service
from espalier.errors import ConfigError
from espalier.methods.registry import create_method, method_names
from espalier.models.presets import classifiers
from espalier.config.run_config import RunConfig

for name in method_names():
    for model in ("unet-tiny", *classifiers()):
        try:
            create_method(RunConfig.from_flat({"method": name, "model": model}))
        except ConfigError:
            continue
        break
    else:
        print("no model goes with", name)
print([m for m in ("torch", "diffusers", "sklearn") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"
