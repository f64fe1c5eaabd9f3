"""The live view: a snapshot counted from a recorded event log, as JSON and text, and served over gRPC."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
import pytest
from rich.console import Console

from espalier.errors import AddressError, ConfigError
from espalier.monitor.ask import as_dict, ask_status, watch
from espalier.monitor.health import check_health
from espalier.monitor.service import WATCHERS, MonitorServer
from espalier.monitor.text import GOING_ON, IDLE, TROUBLE, exit_status, render, troubles
from espalier.monitor.view import TreeView
from espalier.security.transport import Security
from espalier_proto import monitor_pb2 as mpb
from espalier_proto.monitor_pb2_grpc import MonitorStub
from tests.support.processes import wait_until

PARTS = [{"client": "c1", "edge": "e1"}, {"client": "c2", "edge": "e1"}, {"client": "c3", "edge": "e2"}]
VERSIONS = {"espalier": "0.1.0", "flwr": "1.39.0"}


def device(samples: int, *edges: str) -> dict[str, Any]:
    return {"samples": samples, "edges": list(edges), "device": "cpu", "versions": VERSIONS}


def links(up: int, down: int) -> dict[str, dict[str, int]]:
    return {
        link: {"up_bytes": up, "down_bytes": down, "messages": 4} for link in ("client-edge", "edge-cloud")
    }


#: A log as a ServerApp writes it: one window whole, the second under way. Seconds stand for themselves.
LOG: list[dict[str, Any]] = [
    {
        "event": "run",
        "time": 100,
        "run": "r-1",
        "pid": 7,
        "config": {"method": "fedphd", "rounds": 4, "rg": 2},
    },
    {"event": "joined", "time": 101, "edges": ["e1", "e2"], "clients": ["c1", "c2", "c3"]},
    {
        "event": "roster",
        "time": 101,
        "edges": {"e1": {"versions": VERSIONS, "clients": ["c1", "c2"]}, "e2": {"clients": ["c3"]}},
        "clients": {"c1": device(50, "e1"), "c2": device(60, "e1"), "c3": device(70, "e2")},
    },
    {
        "event": "window-start",
        "time": 110,
        "window": 1,
        "rounds": [{"round": r, "participants": PARTS} for r in (1, 2)],
    },
    {
        "event": "fault",
        "time": 125,
        "tier": "edge",
        "node": "c2",
        "kind": "straggler",
        "detail": "no reply",
        "window": 1,
        "round": 2,
    },
    {
        "event": "window-end",
        "time": 130,
        "window": 1,
        "losses": {"1": 0.5, "2": 0.25},
        "links": links(1000, 2000),
        "clients": {
            "c1": {"loss": 0.25, "steps": 12, "seconds": 3.0, "rounds": 2, "total_seconds": 7.0},
            "c3": {"loss": 0.125, "steps": 8, "seconds": 4.0, "rounds": 2, "total_seconds": 9.0},
        },
    },
    {"event": "evaluation", "time": 131, "window": 1, "round": 2, "frechet": 7.5},
    {
        "event": "roster",
        "time": 132,
        "edges": {"e1": {"versions": VERSIONS, "clients": ["c1"]}, "e2": {"clients": ["c3"]}},
        "clients": {"c1": device(50, "e1"), "c3": device(70, "e2")},
    },
    {
        "event": "window-start",
        "time": 140,
        "window": 2,
        "rounds": [{"round": r, "participants": PARTS} for r in (3, 4)],
    },
    {
        "event": "progress",
        "time": 145,
        "edge": "e1",
        "window": 2,
        "round": 3,
        "training": [],
        "done": ["c1"],
        "loss": 0.2,
        "bytes": {"up_bytes": 30, "down_bytes": 40, "messages": 2},
    },
]


def view(*more: Mapping[str, Any]) -> TreeView:
    found = TreeView()
    for event in (*LOG, *more):
        found.feed(event)
    return found


def status(*more: Mapping[str, Any], alive: bool = True) -> mpb.TreeStatus:
    found = view(*more).status(150.0, alive=alive)
    found.cloud.CopyFrom(mpb.CloudStatus(name="default", versions=VERSIONS, started=90.0, superlink=True))
    return found


def test_run_and_totals_are_counted_from_the_log() -> None:
    found = status()
    run, totals = found.run, found.totals
    assert (run.run, run.method, run.status, run.phase) == ("r-1", "fedphd", "running", "training")
    assert (run.window, run.windows, run.round, run.rounds) == (2, 2, 3, 4)
    assert list(run.losses) == [0.5, 0.25]
    assert dict(run.measures) == {"frechet": 7.5}
    # e1 has done all of round 3, e2 nothing yet: 2 rounds and a half in 40 s since 110, 1.5 are left.
    assert run.rounds_done == 2.5
    assert run.seconds_left == pytest.approx(40 / 2.5 * 1.5)
    by_link = {link.link: (link.up_bytes, link.down_bytes) for link in totals.links}
    assert by_link == {"client-edge": (1030, 2040), "edge-cloud": (1000, 2000)}
    assert [(f.tier, f.kind, f.count) for f in totals.faults] == [("edge", "straggler", 1)]
    assert (totals.rounds, totals.windows, totals.window_seconds, totals.last_window_seconds) == (
        2,
        1,
        20,
        20,
    )
    assert (totals.trainings, totals.training_seconds) == (4, 16)


def test_edges_and_clients() -> None:
    found = status()
    e1, e2 = found.edges
    assert (e1.name, e1.connected, dict(e1.versions), e1.clients) == ("e1", True, VERSIONS, 1)
    assert (e1.window, e1.round, list(e1.training), list(e1.done)) == (2, 3, [], ["c1"])
    assert (e1.loss, e1.up_bytes, e1.down_bytes, e1.last_seen) == (0.2, 30, 40, 145)
    assert (e2.round, e2.HasField("loss")) == (0, False)
    c1, c2, c3 = found.clients
    assert (c1.edge, c1.state, c1.samples, c1.steps_per_second, c1.loss) == ("e1", "done", 50, 4.0, 0.25)
    assert (c1.last_seen, c1.faults) == (145, 0)
    # c2 is on no roster any more; c3's edge has not spoken yet, and its first round plans c3.
    assert (c2.state, c2.faults, c2.last_seen, c2.HasField("steps_per_second")) == ("lost", 1, 101, False)
    assert (c3.edge, c3.state, c3.steps_per_second, c3.last_seen) == ("e2", "training", 2.0, 132)


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


def test_json_has_numbers_and_every_plain_field() -> None:
    found = json.loads(json.dumps(as_dict(status())))
    assert found["totals"]["links"][0] == {
        "link": "client-edge",
        "up_bytes": 1030,
        "down_bytes": 2040,
        "messages": 4,
    }
    assert found["clients"][0]["samples"] == 50
    assert found["clients"][1]["edge"] == ""
    assert "loss" not in found["edges"][1]
    assert found["edges"][0]["versions"] == VERSIONS


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


# --- the service -----------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[MonitorServer]:
    with MonitorServer("127.0.0.1:0", None, status, well=False) as running:
        yield running


def test_one_answer_and_health(server: MonitorServer) -> None:
    assert ask_status(server.address, Security()) == status()
    with pytest.raises(Exception, match="is not serving"):
        check_health(server.address, Security())
    server.set_health(True)
    check_health(server.address, Security())


def test_watching_and_its_bounds(server: MonitorServer) -> None:
    stream = watch(server.address, Security(), 0.2)
    assert [next(stream).run.run for _ in range(3)] == ["r-1"] * 3
    stream.close()
    with pytest.raises(AddressError, match=r"interval 0\.01 s"):
        next(watch(server.address, Security(), 0.01))
    with grpc.insecure_channel(server.address) as channel:
        calls: list[Any] = []

        def all_watch() -> bool:
            """Open one more; the server takes note of the end of the first stream when it next has news for it."""
            call = MonitorStub(channel).Watch(mpb.WatchRequest(interval=30))
            with contextlib.suppress(grpc.RpcError):
                next(call)
                calls.append(call)
            return len(calls) == WATCHERS

        wait_until(all_watch, 30, "as many watchers as there may be")
        with pytest.raises(AddressError, match=f"{WATCHERS} watch already"):
            next(watch(server.address, Security(), 1))
        assert ask_status(server.address, Security()).run.run == "r-1"  # single answers still come
        for call in calls:
            call.cancel()


def test_a_port_in_use_is_named(server: MonitorServer) -> None:
    with pytest.raises(AddressError, match=f"--monitor {server.address}: the port is in use"):
        MonitorServer(server.address, None, status).__enter__()


def test_plain_only_on_this_machine() -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        ask_status("192.0.2.1:9094", Security())
