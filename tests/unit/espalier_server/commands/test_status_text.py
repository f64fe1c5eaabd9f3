"""The status as text: faults, exit status and 80 columns."""

from __future__ import annotations

import io

from rich.console import Console

from espalier_proto import monitor_pb2 as mpb
from espalier_server.commands.status_text import GOING_ON, IDLE, TROUBLE, exit_status, render, troubles
from tests.support.event_log import LOG, status


def test_trouble_and_exit_status() -> None:
    assert troubles(status()) == ["client c2 is lost"]
    assert exit_status(status()) == TROUBLE
    back = {**LOG[2], "time": 146}
    assert exit_status(status(back)) == GOING_ON
    dead = status(back, alive=False)
    assert dead.run.status == "dead"
    assert exit_status(dead) == TROUBLE
    over = status({"event": "finished", "time": 149, "reason": ""}, alive=False)
    assert (over.run.status, exit_status(over), troubles(over)) == ("finished", IDLE, [])
    failed = status({"event": "failed", "time": 149, "reason": "disk full"})
    assert troubles(failed) == ["run r-1 failed: disk full"]
    down = status(back)
    down.cloud.superlink = False
    assert exit_status(down) == TROUBLE
    assert exit_status(mpb.TreeStatus()) == IDLE
    assert exit_status(mpb.TreeStatus(cloud=mpb.CloudStatus(superlink=True, waiting=["r-2"]))) == GOING_ON


def test_the_view_fits_80_columns() -> None:
    output = io.StringIO()
    Console(file=output, width=80, force_terminal=True, color_system=None).print(
        render(status(), "q to leave")
    )
    lines = output.getvalue().splitlines()
    assert max(len(line) for line in lines) <= 80
    shown = output.getvalue()
    for part in (
        "window 2/2",
        "round 3/4",
        "24 s left",
        "e1",
        "└ c3",
        "lost",
        "↑ 1.0 kB",
        "straggler c2",
        "q to leave",
    ):
        assert part in shown
    assert lines.index(next(x for x in lines if "e1" in x)) < lines.index(
        next(x for x in lines if "├ c1" in x)
    )
