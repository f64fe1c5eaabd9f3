"""What docs/methods.md says is so: every method is in it, defaults are the settings', and its example runs."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import get_args

import numpy as np
import pytest
from bench.local_tree import LocalClient, LocalTree

from espalier.config.assignments import parse_assignments
from espalier.config.run_settings import keys_of
from espalier.methods.base import Method
from espalier.methods.registry import METHODS
from espalier.methods.run_config import RunConfig
from espalier.models.initial import initial_model
from espalier_server.run import TreeRun
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def test_every_method_has_its_section() -> None:
    headings = set(re.findall(r"^### (\S+)$", PAGE, re.MULTILINE))
    # Methods that exchange no weights are described elsewhere.
    assert set(METHODS) <= headings


def test_defaults_are_the_settings_defaults() -> None:
    """A number, text in quotes, true or false behind a key is a default; a bare word is a choice."""
    keys, defaults = keys_of(RunConfig.groups()), RunConfig().to_flat()
    said = re.findall(r"`([a-z-]+=(?:\"[^\"`]*\"|[0-9.e-]+|true|false))`", PAGE)
    assert len(said) > 60
    for word in said:
        [(key, value)] = parse_assignments([word]).items()
        assert key in keys, word
        assert value == defaults[key], word


@pytest.mark.parametrize("axis", ["selection", "codec", "edge_choice", "level_choice"])
def test_every_choice_of_an_axis_is_in_a_table(axis: str) -> None:
    group, field = keys_of(RunConfig.groups())[axis.replace("_", "-")]
    choices = set(get_args(group.model_fields[field].annotation)) - {"auto"}
    assert choices
    first_cells = " ".join(line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `"))
    assert {c for c in choices if f"`{c}`" not in first_cells} == set()


def example() -> type[Method]:
    """Return the method that the page shows."""
    [source] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    module = ModuleType("fedavgm")
    exec(compile(source, "docs/methods.md", "exec"), module.__dict__)
    shown: type[Method] = module.FedAvgM
    return shown


def test_the_example_runs_and_does_what_it_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(METHODS, "fedavgm", example())
    clients = [LocalClient(f"c{i}", f"digits:{i}/64", (0, 1)) for i in range(3)]
    tree = LocalTree(tmp_path, clients, 2)

    def run(method: str, rounds: int) -> TreeRun:
        more = {"rounds": rounds, "rg": 1, "min-clients": 3}
        return tree.run(f"{method}-{rounds}", {"method": method, "model": "cnn", **more})

    once, twice, shown = (run(*of).state for of in (("fedavg", 1), ("fedavg", 2), ("fedavgm", 2)))
    assert once is not None
    assert twice is not None
    assert shown is not None
    start = initial_model(
        RunConfig.from_flat({"method": "fedavg", "model": "cnn"}), (1, 8, 8), 10
    ).state_dict()
    # Round 1 is FedAvg's, v = w1 - w0. Round 2 adds 0.9 of that to what FedAvg does from the same w1.
    for name, w1 in once.tensors.items():
        expected = twice.tensors[name] + 0.9 * (w1 - start[name].numpy())
        np.testing.assert_allclose(shown.tensors[name], expected, rtol=1e-4, atol=1e-6, err_msg=name)
        assert np.abs(w1 - start[name].numpy()).max() > 1e-4
