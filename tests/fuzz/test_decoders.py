"""Mutated messages at every decoder; `make test-fuzz` throws ten thousand (FUZZ), FUZZ_SEED throws others."""

from __future__ import annotations

import ast
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import espalier.wire
import espalier_edge
import espalier_server
from espalier.wire import control
from tests.fuzz.campaign import Case, Tally, throw
from tests.fuzz.decoders import client_cases, tree_cases, wire_cases
from tests.fuzz.recorded import Recording, record
from tests.fuzz.tree_cases import RUNS

#: How many messages in all; the ports' tests take a tenth of them.
COUNT = int(os.environ.get("FUZZ") or 600)
SEED = int(os.environ.get("FUZZ_SEED") or 1)
#: A small share of messages is of two runs, ten thousand are of all.
NAMES = tuple(RUNS) if COUNT > 2000 else ("fedavg, qsgd", "codistillation")

TALLIES: list[Tally] = []


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recording]:
    return {n: record(tmp_path_factory.mktemp("run"), **RUNS[n]) for n in NAMES}


@pytest.fixture(scope="module")
def cases(recordings: dict[str, Recording]) -> list[Case]:
    return [*wire_cases(), *client_cases(), *tree_cases(recordings)]


@pytest.fixture(scope="module", autouse=True)
def _figures() -> Iterator[None]:
    """Say how many messages of which kind were refused by which error."""
    yield
    sent, refused = sum(t.sent for t in TALLIES), Counter[str]()
    for tally in TALLIES:
        refused.update(tally.refused)
        print(f"\n{tally.case:48s} {tally.sent:5d}, sound {tally.sound}, {dict(tally.refused)}", end="")
    print(
        f"\n{sent} messages at {len(TALLIES)} decoders: {dict(refused)}, {sum(t.sound for t in TALLIES)} sound"
    )


def test_every_mutant_is_refused_or_sound(cases: list[Case]) -> None:
    whole = sum(c.share for c in cases)
    faults = []
    for case in cases:
        case.valid()
        tally = throw(case, max(3, round(COUNT * 0.9 * case.share / whole)), SEED)
        TALLIES.append(tally)
        faults += tally.faults
    assert not faults, "\n".join(faults)
    assert sum(t.refused.total() for t in TALLIES) > 0.4 * sum(t.sent for t in TALLIES)


#: Modules that read messages of other tiers.
READERS = (
    *sorted(Path(espalier.wire.__path__[0]).glob("*.py")),
    *(Path(espalier_edge.__path__[0]) / f"{name}.py" for name in ("calls", "relay")),
    *(
        Path(espalier_server.__path__[0]) / f"{name}.py"
        for name in ("contributions", "exchange", "inquiries", "window_aggregator")
    ),
)


def decoders() -> dict[str, tuple[str, list[range]]]:
    """Return the functions that judge what came: they are told whom to name, refuse, or read tensors.

    By the module's and the function's name: the file, and the lines of each statement on the way of what is accepted.
    """
    found = {}
    for path in READERS:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            told = {a.arg for a in (*node.args.args, *node.args.kwonlyargs)} & {"sender", "signer"}
            if told or any(_judges(n) for n in ast.walk(node)):
                found[f"{path.parent.name}/{path.stem}.{node.name}:{node.lineno}"] = (
                    str(path),
                    list(_accepting(node.body)),
                )
    return found


def _judges(node: ast.AST) -> bool:
    """Whether a node refuses a message or reads its tensors."""
    if isinstance(node, ast.Raise):
        return isinstance(node.exc, ast.Call) and getattr(node.exc.func, "id", "") == "WireError"
    return isinstance(node, ast.Attribute) and node.attr == "read_weights"


def _accepting(body: list[ast.stmt]) -> Iterator[range]:
    """Yield the lines of the statements that run for something sound: not what leads to a refusal."""
    for node in body:
        if isinstance(node, ast.Raise | ast.FunctionDef) or _is_text(node):
            continue
        blocks = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
        if not any(blocks):
            yield range(node.lineno, (node.end_lineno or node.lineno) + 1)
        for block in blocks:
            if block and not isinstance(block[-1], ast.Raise):
                yield from _accepting(block)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_the_table_has_every_decoder(cases: list[Case]) -> None:
    """What was really sent runs every statement of every decoder, but refusals; one that is in no case fails here."""
    expected, ran = decoders(), set[tuple[str, int]]()
    files = {str(path) for path in READERS}
    assert len(expected) > 30

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            ran.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    control._sections.cache_clear()  # or what another test had read would not be read here
    former = sys.gettrace()
    sys.settrace(trace)
    try:
        for case in cases:
            case.valid()
    finally:
        sys.settrace(former)
    missing = [
        f"{name}, line {lines.start}"
        for name, (path, statements) in expected.items()
        for lines in statements
        if not any((path, line) in ran for line in lines)
    ]
    assert not missing, "\n".join(missing)
