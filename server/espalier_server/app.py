"""The ServerApp that `flwr run` starts at the cloud's SuperLink."""

from __future__ import annotations

import os

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from espalier.methods.run_config import RunConfig
from espalier.monitor.logs import FORMAT_ENV, configure
from espalier_server.cloud_status import remember_run
from espalier_server.records.resume import locked
from espalier_server.run import TreeRun, check_folder, cloud_state, run_folder
from espalier_server.superlink.grid import TreeGrid

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Execute one run with the settings of the run config."""
    configure(os.environ.get(FORMAT_ENV, "text"))
    settings = RunConfig.from_flat(context.run_config)
    out = run_folder(settings, context.run_id)
    with locked(out):
        check_folder(settings, out)
        run = TreeRun(settings, TreeGrid(grid), out, cloud_state())
        remember_run(cloud_state(), run.run_id, out)
        run.run()
