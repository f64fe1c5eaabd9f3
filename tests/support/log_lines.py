"""The events that a test logged in JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest


def json_lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Return the events on standard error since the last call, one for each line."""
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]
