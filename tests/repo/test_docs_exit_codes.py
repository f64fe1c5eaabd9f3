"""docs/exit-codes.md lists the exit codes that the command line has, each with its error."""

from __future__ import annotations

import re

from espalier import cli, errors
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")


def test_the_table_holds_every_error_with_its_code() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", PAGE, re.MULTILINE)
    classes = [
        c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.EspalierError)
    ]
    assert sorted((int(code), name) for code, name in rows) == sorted(
        (c.exit_code, c.__name__) for c in classes
    )


def test_the_table_holds_success_and_interruption() -> None:
    assert set(re.findall(r"^\| (\d+) \| \S \|", PAGE, re.MULTILINE)) == {"0", str(cli.INTERRUPTED)}


def test_every_code_has_cause_and_remedy() -> None:
    for code, _, cause, remedy in re.findall(
        r"^\| (\d+) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", PAGE, re.MULTILINE
    ):
        assert len(cause) > 5, code
        assert len(remedy) > 5 or code in ("0", str(cli.INTERRUPTED)), code
