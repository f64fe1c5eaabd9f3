from __future__ import annotations

import logging

import pytest

from espalier.monitor.node_log import event_logger


def test_an_unreachable_home_is_one_line_that_says_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    tell = event_logger(logging.getLogger("espalier.test"))
    with caplog.at_level(logging.DEBUG, "espalier.test"):
        tell("unreachable", {"upstream": "192.0.2.7:9093", "reason": "Connection refused"})
        tell("reply", {"upstream": "192.0.2.7:9093", "message_type": "train", "seconds": 1.5, "wanted": True})
        tell("something new", {"upstream": "192.0.2.7:9093"})
    first, second, third = caplog.records
    assert first.levelno == logging.WARNING
    assert "192.0.2.7:9093 does not answer (Connection refused)" in first.getMessage()
    assert "is the address right" in first.getMessage()
    assert second.getMessage() == "answered a 'train' message of 192.0.2.7:9093 after 1.50 s"
    assert third.getMessage() == "something new at 192.0.2.7:9093"
