"""What a node knows of a run: its configuration and its bundle, from its server or from a reserved record."""

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
    """What a home says about its runs: bundle and configuration, asked once a run."""

    def __init__(self, client: FleetClient) -> None:
        self._client = client
        self._held: OrderedDict[int, tuple[Fab | None, UserConfig]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, run_id: int) -> tuple[Fab | None, UserConfig]:
        """Return a run's bundle, if it has one, and its configuration: the app's defaults with the run's overrides.

        Raises
        ------
        HomeFault
            If the home does not answer or refuses.
        """
        with self._lock:
            if run_id not in self._held:
                run = self._client.get_run(run_id)
                fab = self._client.get_fab(run_id, run.fab_hash) if run.fab_hash else None
                config = get_fused_config_from_fab(fab.content, run) if fab else dict(run.override_config)
                self._held[run_id] = (fab, config)
            while len(self._held) > RUNS_CACHED:
                self._held.popitem(last=False)
            return self._held[run_id]


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
        raise ValueError("the configuration in espalier.run is nested without end") from error
    if not isinstance(config, dict):
        raise ValueError("the configuration in espalier.run is no JSON object")
    for key, value in config.items():
        if not isinstance(value, (bool, int, float, str)):
            raise ValueError(f"the configuration in espalier.run gives {key!r} a {type(value).__name__}")
    return run, config
