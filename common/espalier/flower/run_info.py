"""The configuration and app bundle of a run, fetched from a server or read from a reserved record of a message."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import Any

from flwr.common.config import get_fused_config_from_fab
from flwr.supercore.fab import Fab

from espalier.flower.fleet_client import FleetClient

RUN_RECORD = "espalier.run"
RUNS_CACHED = 8

UserConfig = dict[str, bool | int | float | str]


class RunInfo:
    """The app bundle and configuration of a server's runs, each fetched once."""

    def __init__(self, client: FleetClient) -> None:
        self._client = client
        self._cached: OrderedDict[int, tuple[Fab | None, UserConfig]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, run_id: int) -> tuple[Fab | None, UserConfig]:
        """Return the bundle of a run, if it has one, and its configuration: the app's defaults with the overrides.

        Raises
        ------
        UpstreamError
            If the server does not answer or refuses.
        """
        with self._lock:
            if run_id not in self._cached:
                run = self._client.get_run(run_id)
                fab = self._client.get_fab(run_id, run.fab_hash) if run.fab_hash else None
                config = get_fused_config_from_fab(fab.content, run) if fab else dict(run.override_config)
                self._cached[run_id] = (fab, config)
            while len(self._cached) > RUNS_CACHED:
                self._cached.popitem(last=False)
            return self._cached[run_id]


def parse_run_record(values: Any) -> tuple[str, dict[str, bool | int | float | str]]:
    """Read the reserved record ``espalier.run``: the run id and the run configuration.

    Raises
    ------
    ValueError
        If it is malformed.
    """
    run, raw = values.get("run"), values.get("config")
    if not isinstance(run, str) or not run:
        raise ValueError("the record espalier.run has no run id")
    if not isinstance(raw, bytes):
        raise ValueError("the record espalier.run has no configuration")
    try:
        config = json.loads(raw)
    except RecursionError as error:
        raise ValueError("the configuration in espalier.run is nested too deeply") from error
    if not isinstance(config, dict):
        raise ValueError("the configuration in espalier.run is not a JSON object")
    for key, value in config.items():
        if not isinstance(value, (bool, int, float, str)):
            raise ValueError(f"in the configuration in espalier.run, {key!r} is a {type(value).__name__}")
    return run, config
