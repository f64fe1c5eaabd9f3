"""Structured logs: one JSON object an event, with the fields given besides the message."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from espalier.monitor import logs
from espalier.monitor.node_log import event_logger
from tests.support.log_lines import json_lines


@pytest.mark.usefixtures("as_json")
def test_a_line_has_time_level_logger_message_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("espalier.edge")
    with logs.bind(run="r-1", window=2):
        log.info("round %d:\n%s", 3, "done", extra={"round": 3})
    log.warning("after", extra={"path": Path("x"), "odd": object()})
    first, second = json_lines(capsys)
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "INFO",
        "logger": "espalier.edge",
        "message": "round 3: done",
        "run": "r-1",
        "window": 2,
        "round": 3,
    }
    assert second["message"] == "after"
    assert "run" not in second
    assert second["odd"].startswith("<object")


@pytest.mark.usefixtures("as_json")
def test_flowers_loggers_warnings_and_tracebacks(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("flwr").info("Starting Flower")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("espalier").exception("unforeseen")
    logs.announce("cloud is ready")
    logs.say_error("no data")
    found = json_lines(capsys)
    assert [(f["logger"], f["level"], f["message"]) for f in found] == [
        ("flwr", "INFO", "Starting Flower"),
        ("espalier", "ERROR", "unforeseen"),
        ("espalier", "INFO", "cloud is ready"),
        ("espalier", "ERROR", "no data"),
    ]
    assert "ValueError: broken" in found[1]["exception"]


@pytest.mark.usefixtures("as_json")
def test_a_nodes_events_are_fields(capsys: pytest.CaptureFixture[str]) -> None:
    event_logger(logging.getLogger("espalier.client"))("disconnected", {"upstream": "e:1", "reason": "gone"})
    [found] = json_lines(capsys)
    assert (found["event"], found["upstream"], found["reason"]) == ("disconnected", "e:1", "gone")


def test_text_is_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text")
    logging.getLogger("espalier.edge").info("hello")
    logs.announce("ready")
    logs.say_error("no data")
    said = capsys.readouterr()
    assert said.out == "ready\n"
    assert "espalier.edge INFO hello" in said.err
    assert said.err.endswith("error: no data\n")
