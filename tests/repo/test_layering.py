"""What import-linter's contracts (pyproject.toml) leave open: circles between modules, and what a process loads."""

from __future__ import annotations

import ast
import subprocess
import sys

import grimp
import pytest

from tests.support.paths import ROOT

PACKAGES = ("espalier", "espalier_server", "espalier_edge", "espalier_client", "espalier_proto")


def components(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one node (Tarjan, SIAM J. Comput. 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in graph[node]:
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for node in graph:
        if node not in order:
            visit(node)
    return found


def test_components_are_found() -> None:
    assert components({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert components({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set()}) == [["a", "b", "c"]]


def test_no_two_modules_import_each_other() -> None:
    """Neither directly nor through others; imports inside functions and under TYPE_CHECKING count."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    imported = {module: graph.find_modules_directly_imported_by(module) for module in sorted(graph.modules)}
    assert components(imported) == []


def test_every_module_says_why_it_exists() -> None:
    for package in ("common", "bench", "client", "edge", "server"):
        for path in sorted((ROOT / package).rglob("*.py")):
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
            ],
        ),
        (
            "espalier_server.superlink.supervisor",
            ["torch", "torchvision", "diffusers", "sqlalchemy", "matplotlib"],
        ),
        ("espalier_server.app", ["torch_pruning", "sklearn", "torchmetrics", "torchvision"]),
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
from espalier.methods.run_config import RunConfig

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
