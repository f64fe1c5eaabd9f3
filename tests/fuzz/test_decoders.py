"""Mutated messages at every decoder; `make test-fuzz` throws ten thousand (FUZZ), FUZZ_SEED throws others."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.fuzz.campaign import Case, Tally, throw
from tests.fuzz.decoders import RUNS, client_cases, tree_cases, wire_cases
from tests.fuzz.recorded import Recording, record

ROOT = Path(__file__).resolve().parents[2]
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


def decoders() -> dict[tuple[str, str], str]:
    """Return the functions of common/wire that judge what came: those that are told whom to name, or that refuse.

    By (file, name) as the interpreter tells them when they are called.
    """
    found = {}
    for path in sorted((ROOT / "common" / "wire").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            names = {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
            refuses = any(
                isinstance(n, ast.Raise)
                and isinstance(n.exc, ast.Call)
                and getattr(n.exc.func, "id", "") == "WireError"
                for n in ast.walk(node)
            )
            protocol = len(node.body) == 1 and isinstance(node.body[0], ast.Expr)  # a docstring, no code
            if (names & {"sender", "signer"} or refuses) and not protocol:
                found[str(path), node.name] = f"{path.stem}.{node.name}"
    return found


def test_the_table_has_every_decoder_of_the_wire(cases: list[Case]) -> None:
    """A decoder is in the table if one of its cases really calls it; a new one that none calls fails here."""
    expected, called = decoders(), set[tuple[str, str]]()
    assert len(expected) > 15

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            called.add((frame.f_code.co_filename, frame.f_code.co_name))

    for name in sorted({Path(path).stem for path, _ in expected}):
        importlib.import_module(f"common.wire.{name}")
    sys.setprofile(profile)
    try:
        for case in cases:
            case.valid()
    finally:
        sys.setprofile(None)
    assert sorted(v for k, v in expected.items() if k not in called) == []
