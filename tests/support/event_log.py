"""A recorded event log of a run and the status snapshot that it gives, for tests of monitoring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from espalier_proto import monitor_pb2 as mpb
from espalier_server.tree_view import TreeView

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
