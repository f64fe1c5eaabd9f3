"""The status as JSON."""

from __future__ import annotations

import json

from espalier_server.commands.status_client import as_dict
from tests.support.event_log import VERSIONS, status


def test_json_has_numbers_and_every_plain_field() -> None:
    found = json.loads(json.dumps(as_dict(status())))
    assert found["totals"]["links"][0] == {
        "link": "client-edge",
        "up_bytes": 1030,
        "down_bytes": 2040,
        "messages": 4,
    }
    assert found["clients"][0]["samples"] == 50
    assert found["clients"][1]["edge"] == ""
    assert "loss" not in found["edges"][1]
    assert found["edges"][0]["versions"] == VERSIONS
