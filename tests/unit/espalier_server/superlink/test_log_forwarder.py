"""Lines that a stock Flower process writes become events of the cloud's log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from espalier_server.superlink.log_forwarder import LogForwarder
from tests.support.log_lines import json_lines
from tests.support.processes import wait_until


@pytest.mark.usefixtures("as_json")
def test_lines_of_a_stock_process_are_forwarded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "superlink.log"
    path.write_text("INFO :      old\n")
    said: list[dict[str, Any]] = []
    with LogForwarder(path, "flwr.superlink"), path.open("a") as file:
        file.write(
            "\x1b[93mWARNING\x1b[0m :      a node is gone\n\nplain words\n"
            '{"level": "INFO", "message": "ours"}\nINFO : half'
        )
        file.flush()

        def all_said() -> bool:
            said.extend(json_lines(capsys))
            return len(said) >= 3

        wait_until(all_said, 10, "the lines")
        file.write(" a line\n")
        file.flush()
    said += json_lines(capsys)
    assert [(f["level"], f["message"]) for f in said] == [
        ("WARNING", "a node is gone"),
        ("INFO", "plain words"),
        ("INFO", "ours"),
        ("INFO", "half a line"),
    ]
    assert [f.get("logger") for f in said] == ["flwr.superlink", "flwr.superlink", None, "flwr.superlink"]
