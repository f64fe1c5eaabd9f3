"""Many clients in one process: their names, states and shares, and that they train one at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict

from espalier.errors import ConfigError
from espalier.flower.node_resources import ChannelPool, HeartbeatScheduler, NodeResources
from espalier.flower.resident import ResidentNode
from espalier.flower.upstreams import Upstream
from espalier_client.replicas import Replica, Replicas, plan_replicas
from espalier_edge.fleet.server import InlineFleet
from tests.support.processes import wait_until


def test_each_has_its_own_name_state_and_share(tmp_path: Path) -> None:
    assert plan_replicas("c", "digits", tmp_path, 2) == [
        Replica("c-000", "digits:0/2", tmp_path / "c-000"),
        Replica("c-001", "digits:1/2", tmp_path / "c-001"),
    ]
    planned = plan_replicas("c", "digits:100/500:dirichlet=0.3", tmp_path, 50)
    assert [r.data for r in planned][::49] == ["digits:100/500:dirichlet=0.3", "digits:149/500:dirichlet=0.3"]
    assert plan_replicas("c", "./a:0/1:iid+holdout=0.2", tmp_path, 2)[1].data == "./a:1/2:iid+holdout=0.2"
    many = plan_replicas("c", "digits", tmp_path, 1001)
    assert (many[0].name, many[-1].name) == ("c-0000", "c-1000")
    assert len({r.data for r in many}) == 1001


def test_what_cannot_be_dealt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"need 12 shares, not 10; give e.g. digits:0/3"):
        plan_replicas("c", "digits:9/10", tmp_path, 3)
    with pytest.raises(ConfigError, match="give a shorter one"):
        plan_replicas("c" * 62, "digits", tmp_path, 3)


def test_replicas_share_channels() -> None:
    channels, upstream = ChannelPool(2), Upstream("127.0.0.1:1", insecure=True)
    first, second, third = (channels.acquire(upstream) for _ in range(3))
    assert first is second
    assert third is not first
    channels.release(first)  # dead, or closed
    fourth, fifth = channels.acquire(upstream), channels.acquire(upstream)
    assert fourth is third
    assert fifth not in (first, third)
    assert channels.acquire(Upstream("127.0.0.1:2", insecure=True)) not in (first, third, fifth)


def test_a_heartbeats_calls_in_time_and_outlives_a_fault() -> None:
    heartbeats = HeartbeatScheduler()
    said: list[str] = []
    done = threading.Event()

    def late() -> None:
        said.append("late")
        done.set()

    def fail() -> None:
        raise RuntimeError("an unexpected error")

    heartbeats.after(0.2, late)
    heartbeats.after(0.0, fail)
    heartbeats.after(0.01, lambda: said.append("early"))
    assert done.wait(5)
    assert said == ["early", "late"]
    heartbeats.stop()
    heartbeats.after(0.0, lambda: said.append("never"))
    assert said == ["early", "late"]


def own_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith(("poll", "work", "heartbeats"))]


def test_replicas_call_their_app_one_at_a_time(tmp_path: Path) -> None:
    inside, most, side = [0], [0], threading.Event()

    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "query.light":
            side.set()
            return Message(RecordDict(), reply_to=message)
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        assert side.wait(10)  # no train call ends before the light one of another node was answered
        inside[0] -= 1
        return Message(RecordDict(), reply_to=message)

    fleet = InlineFleet("127.0.0.1:0")
    fleet.start()
    try:
        upstreams = [Upstream(f"127.0.0.1:{fleet.port}", insecure=True)]
        resources = NodeResources(100, exclusive=True, exempt=frozenset({"query.light"}))
        nodes = [
            ResidentNode(app, upstreams, tmp_path / str(i), node_config={"i": i}, resources=resources)
            for i in range(8)
        ]
        with Replicas(nodes, resources):
            wait_until(lambda: len(fleet.nodes()) == 8, 30, "the nodes")
            assert len(own_threads()) == 9  # while idle: one a node and home, and one for all heartbeats
            grid = fleet.open_run()
            ids = [node.node_id for node in fleet.nodes()]
            messages = [grid.create_message(RecordDict(), "train", i, "") for i in ids[1:]]
            messages.append(grid.create_message(RecordDict(), "query.light", ids[0], ""))
            replies = list(grid.exchange(messages, deadline=20))
            assert len(replies) == 8
            assert all(reply.has_content() for reply in replies)
            assert most == [1]
        wait_until(lambda: not fleet.nodes(), 10, "their leaving")
        wait_until(lambda: not own_threads(), 10, "the end of their threads")
    finally:
        fleet.stop()
