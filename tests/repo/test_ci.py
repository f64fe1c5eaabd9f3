"""The workflow, hooks and templates: they parse, call targets that exist, and check what `make lint` checks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_workflow_calls_make_targets_that_exist() -> None:
    jobs = load(".github/workflows/test.yml")["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert "make test" in commands
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    assert {command.removeprefix("make ") for command in commands} <= targets
    assert all("timeout-minutes" in job for job in jobs.values())


def test_hooks_check_what_make_lint_checks() -> None:
    [repo] = load(".pre-commit-config.yaml")["repos"]
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in repo["hooks"]}
    recipe = MAKEFILE.split("\nlint: setup\n")[1].split("\n\n")[0]
    assert tools == set(re.findall(r"\$\(BIN\)/([\w-]+)", recipe))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_issue_templates_are_forms(path: Path) -> None:
    form = load(f".github/ISSUE_TEMPLATE/{path.name}")
    if path.name == "config.yml":
        assert form == {"blank_issues_enabled": True}
        return
    assert set(form) <= {"name", "description", "labels", "body"}
    identifiers = [field["id"] for field in form["body"]]
    assert len(identifiers) == len(set(identifiers)) > 0
    assert all(field["attributes"]["label"] for field in form["body"])
