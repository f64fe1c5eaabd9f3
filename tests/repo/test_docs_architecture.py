"""docs/architecture.md shows the layers that `make lint` checks, and the packages that import Flower's internals."""

from __future__ import annotations

import re
import tomllib

from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
    "contracts"
]


def test_the_table_has_every_layer_in_order() -> None:
    [contract] = [c for c in CONTRACTS if c["type"] == "layers" and c["containers"] == ["espalier"]]
    layer_of = {
        name: number for number, layer in enumerate(contract["layers"]) for name in re.findall(r"\w+", layer)
    }
    rows = [
        re.findall(r"`espalier\.(\w+)`", row)
        for row in re.findall(r"^\| (`espalier\.[^|]*) \|", PAGE, re.MULTILINE)
    ]
    rows = rows[
        : next(i for i, row in enumerate(rows) if "lazy" in row) + 1
    ]  # the table of the adapters follows
    numbers = [layer_of[name] for row in rows for name in row]
    assert numbers == sorted(numbers)
    packages = {path.parent.name for path in (ROOT / "common" / "espalier").glob("*/__init__.py")}
    assert packages <= {name for row in rows for name in row}


def test_the_adapters_are_those_of_the_contract() -> None:
    [contract] = [c for c in CONTRACTS if c["type"] == "forbidden" and c["forbidden_modules"] == ["flwr"]]
    adapters = {line.split(".** ->")[0] for line in contract["ignore_imports"] if line.endswith("-> flwr.**")}
    section = PAGE.split("## Why Flower's internals")[1]
    assert set(re.findall(r"^\| `(espalier[\w.]*)` \|", section, re.MULTILINE)) == adapters
