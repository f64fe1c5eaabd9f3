"""Fixtures of the integration tests: benches run in this process."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import pytest
from bench.report import run

from tests.support.benches import RunBench


@pytest.fixture
def run_bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunBench:
    """Run a bench as ``python -m bench.NAME --tiny --json`` does, without starting another interpreter."""

    def start(name: str, *options: str) -> dict[str, Any]:
        module = importlib.import_module(f"bench.{name}")
        arguments = ["--tiny", "--json", *options]
        capsys.readouterr()
        if hasattr(module, "main"):
            monkeypatch.setattr(sys, "argv", [f"bench.{name}", *arguments])
            status = module.main()
        else:
            status = run(name, module.measure, module.ABOUT, arguments)
        printed = capsys.readouterr()
        assert status == 0, printed.err
        result: dict[str, Any] = json.loads(printed.out)
        assert result["bench"] == name
        return result

    return start
