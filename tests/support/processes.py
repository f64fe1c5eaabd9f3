"""What several tests need: Flower's own processes, free ports, and waiting for something to come about."""

from __future__ import annotations

from bench.stock import (
    SuperLink,
    app_bundle,
    environment,
    free_port,
    running,
    serverapp_grid,
    stop_process,
    superlink,
    supernode,
    wait_until,
)

__all__ = [
    "SuperLink",
    "app_bundle",
    "environment",
    "free_port",
    "running",
    "serverapp_grid",
    "stop_process",
    "superlink",
    "supernode",
    "wait_until",
]
