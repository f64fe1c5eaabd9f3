"""The type of the fixture that runs a bench."""

from __future__ import annotations

from typing import Any, Protocol


class RunBench(Protocol):
    """Runs a bench in its tiny form and returns the JSON object that it prints."""

    def __call__(self, name: str, *options: str) -> dict[str, Any]: ...
