"""The ServerApp that `flwr run` starts at the cloud's SuperLink."""

from __future__ import annotations

import os

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.flower.cloud_grid import TreeGrid
from common.monitor.logs import FORMAT_ENV, configure
from common.run.config import RunConfig
from common.run.resume import at_work
from server.monitor import remember_run
from server.run import TreeRun, check_folder, cloud_state, run_folder

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one run of the tree, as the run config says."""
    configure(os.environ.get(FORMAT_ENV, "text"))
    settings = RunConfig.from_flat(context.run_config)
    out = run_folder(settings, context.run_id)
    with at_work(out):
        check_folder(settings, out)
        run = TreeRun(settings, TreeGrid(grid), out, cloud_state())
        remember_run(cloud_state(), run.run_id, out)
        run.run()
