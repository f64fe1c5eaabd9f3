"""gRPC's health service; its answer has versions and time as metadata, for `espalier preflight`."""

# The methods of a gRPC servicer are named as in its .proto file.
# ruff: noqa: N802

from __future__ import annotations

import time
from typing import Any

from grpc_health.v1.health import HealthServicer

from espalier import distribution

VERSION_KEYS = {"espalier": "x-espalier-version", "flwr": "x-flwr-version"}
TIME_KEY = "x-time"


class HealthService(HealthServicer):
    """The library's servicer, with versions and time in the initial metadata."""

    def __init__(self) -> None:
        super().__init__()
        self._facts = tuple(
            (VERSION_KEYS[name], found) for name, found in distribution.versions("flwr").items()
        )

    def Check(self, request: Any, context: Any) -> Any:
        """Return whether the server is healthy."""
        context.send_initial_metadata((*self._facts, (TIME_KEY, f"{time.time():.3f}")))
        return super().Check(request, context)
