"""Method files stay short and do not repeat one another."""

from __future__ import annotations

import inspect
import statistics
from pathlib import Path

from espalier.methods.registry import METHODS

#: Lines in a row that count as a repetition.
RUN = 6


def method_files() -> list[Path]:
    return sorted({Path(inspect.getfile(kind)) for kind in METHODS.values()})


def code_lines(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [x for x in lines if x and not x.startswith(("#", "from ", "import ", '"""'))]


def test_the_median_method_file_is_under_150_lines() -> None:
    lengths = [len(p.read_text(encoding="utf-8").splitlines()) for p in method_files()]
    assert len(lengths) >= 15
    assert statistics.median(lengths) < 150


def test_under_a_tenth_of_their_lines_are_duplicated() -> None:
    files = {p: code_lines(p) for p in method_files()}
    places: dict[tuple[str, ...], list[tuple[Path, int]]] = {}
    for path, lines in files.items():
        for start in range(len(lines) - RUN + 1):
            places.setdefault(tuple(lines[start : start + RUN]), []).append((path, start))
    repeated = {
        (path, start + offset)
        for found in places.values()
        if len({path for path, _ in found}) > 1
        for path, start in found
        for offset in range(RUN)
    }
    assert len(repeated) < 0.1 * sum(len(lines) for lines in files.values())
