"""The record of a message that names the run and its configuration."""

from __future__ import annotations

import json

import pytest
from flwr.app import ConfigRecord

from espalier.flower.run_info import parse_run_record


def test_the_reserved_record() -> None:
    config = {"lr": 0.1, "n": 3, "flag": True, "name": "x"}
    assert parse_run_record(ConfigRecord({"run": "r1", "config": json.dumps(config).encode()})) == (
        "r1",
        config,
    )


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"config": b"{}"}, "no run id"),
        ({"run": "r"}, "no configuration"),
        ({"run": "r", "config": b"[]"}, "not a JSON object"),
        ({"run": "r", "config": b'{"a": [1]}'}, "'a' is a list"),
        ({"run": "r", "config": b"{"}, "Expecting"),
    ],
)
def test_a_malformed_reserved_record(record: dict[str, str | bytes], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        parse_run_record(ConfigRecord(dict(record)))
