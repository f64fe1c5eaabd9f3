"""Resident nodes at an inline Fleet server: replies as they come, deadlines, faults, keys, many homes."""

from __future__ import annotations

import datetime
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.primitives.asymmetric import private_key_to_bytes, public_key_to_bytes
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from espalier.errors import AddressError, StateError
from espalier.flower import fleet_client
from espalier.flower.arrays import numpy_view
from espalier.flower.fleet_client import FleetClient, Pulled
from espalier.flower.inline_objects import MAX_INLINE_BYTES, select_inline
from espalier.flower.resident import RUN_RECORD, ResidentNode, Upstream
from espalier.flower.signed_channel import SignedChannel
from espalier.flower.upstreams import UpstreamRefusedError, UpstreamUnavailableError
from espalier_edge.fleet.server import InlineFleet
from tests.support.flower_helpers import (
    empty,
    fleet,
    instruct,
    online,
    resident,
    resident_process,
    weights,
)
from tests.support.processes import free_port, wait_until
from tests.support.resident_process import app


def address(server: InlineFleet) -> str:
    return f"127.0.0.1:{server.port}"


def test_a_round(tmp_path: Path) -> None:
    with (
        fleet() as server,
        resident(app, tmp_path / "a", address(server)) as a,
        resident(app, tmp_path / "b", address(server), node_config={"k": 3}) as b,
    ):
        assert a.wait_connected(20)
        assert b.wait_connected(20)
        grid = server.open_run(run_config={"lr": 0.5})
        nodes = online(server, 2)
        assert list(grid.get_node_ids()) == nodes
        for size in (256, 3_000_000):
            for calls in (1, 2):
                replies = list(grid.exchange(instruct(grid, nodes, weights(size)), deadline=30))
                assert sorted(reply.metadata.src_node_id for reply in replies) == nodes
                for reply in replies:
                    values = numpy_view(reply.content.array_records["w"]["flat"])
                    np.testing.assert_array_equal(values, np.full(size, 2, np.float32))
                    assert reply.content["m"]["calls"] == calls + (2 if size > 256 else 0)
                    assert json.loads(str(reply.content["seen"]["run_config"])) == {"lr": 0.5}
                assert empty(server)
        configs = {str(reply.content["seen"]["node_config"]) for reply in replies}
        assert configs == {"{}", '{"k": 3}'}
        assert (grid.abandoned, grid.late) == (0, 0)
        grid.close()


def test_the_reserved_record_names_the_run_and_its_configuration(tmp_path: Path) -> None:
    record = ConfigRecord({"run": "tree-1", "config": json.dumps({"lr": 0.25}).encode()})
    with fleet() as server, resident(app, tmp_path, address(server)):
        nodes = online(server, 1)
        calls = []
        for _ in range(2):  # two Flower runs, one run of ours
            grid = server.open_run()
            content = RecordDict({"w": weights(), RUN_RECORD: record})
            (reply,) = grid.exchange([grid.create_message(content, "train", nodes[0], "1")], deadline=20)
            assert json.loads(str(reply.content["seen"]["run_config"])) == {"lr": 0.25}
            assert reply.content["seen"]["keys"] == "w"
            calls.append(reply.content["m"]["calls"])
            grid.close()
        assert calls == [1, 2]
        grid = server.open_run()
        bad = RecordDict({RUN_RECORD: ConfigRecord({"run": "tree-1", "config": b"{"})})
        (reply,) = grid.exchange([grid.create_message(bad, "train", nodes[0], "1")], deadline=20)
        assert reply.has_error()


def test_an_exception_in_the_app_becomes_an_error_reply(tmp_path: Path) -> None:
    with fleet() as server, resident(app, tmp_path, address(server)):
        grid = server.open_run()
        nodes = online(server, 1)
        (reply,) = grid.exchange(instruct(grid, nodes, fail=True), deadline=20)
        assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        assert reply.error.reason == "RuntimeError: told to fail"
        assert reply.metadata.src_node_id == nodes[0]
        (reply,) = grid.exchange(instruct(grid, nodes), deadline=20)
        assert reply.has_content()
        assert empty(server)


def test_a_deadline_drops_stragglers_and_refuses_their_replies(tmp_path: Path) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    with (
        fleet() as server,
        resident(app, tmp_path / "a", address(server)),
        resident(
            app, tmp_path / "b", address(server), on_event=lambda kind, facts: events.append((kind, facts))
        ) as slow,
    ):
        grid = server.open_run()
        online(server, 2)
        slow_id = slow._upstreams[address(server)].client.node_id
        quick = [node for node in grid.get_node_ids() if node != slow_id]
        messages = instruct(grid, quick) + instruct(grid, [slow_id], sleep=1.5, reply=12_000_000)
        began = time.monotonic()
        replies = list(grid.exchange(messages, deadline=0.7))
        assert 0.6 < time.monotonic() - began < 1.4
        assert [reply.metadata.src_node_id for reply in replies] == quick
        assert grid.abandoned == 1
        assert empty(server)
        wait_until(lambda: grid.late == 1, 20, "the late reply")
        assert empty(server)
        wait_until(lambda: any(kind == "reply" and not facts["wanted"] for kind, facts in events), 10)
        replies = list(grid.exchange(instruct(grid, grid.get_node_ids()), deadline=20))
        assert len(replies) == 2


def test_a_quorum_starts_the_grace_period(tmp_path: Path) -> None:
    with (
        fleet() as server,
        resident(app, tmp_path / "a", address(server)),
        resident(app, tmp_path / "b", address(server)),
    ):
        grid = server.open_run()
        nodes = online(server, 2)
        messages = instruct(grid, nodes[:1]) + instruct(grid, nodes[1:], sleep=5)
        began = time.monotonic()
        replies = list(grid.exchange(messages, deadline=30, quorum=1, grace=0.3))
        assert len(replies) == 1
        assert time.monotonic() - began < 3
        assert empty(server)


def test_replies_are_yielded_on_arrival(tmp_path: Path) -> None:
    with (
        fleet() as server,
        resident(app, tmp_path / "a", address(server)),
        resident(app, tmp_path / "b", address(server)),
    ):
        grid = server.open_run()
        nodes = online(server, 2)
        exchange = grid.exchange(instruct(grid, nodes[:1]) + instruct(grid, nodes[1:], sleep=4), deadline=30)
        began = time.monotonic()
        assert next(iter(exchange)).metadata.src_node_id == nodes[0]
        assert time.monotonic() - began < 3
        exchange.close()  # type: ignore[attr-defined]
        assert grid.abandoned == 1
        assert empty(server)


def test_a_shared_payload_is_offered_once() -> None:
    with fleet() as server:
        server.register_key(key_of(ec.generate_private_key(ec.SECP256R1())), "x")
        ids = [server.fleet.state.create_node("a", "a", bytes([i]), 10) for i in range(5)]
        for node in ids:
            server.fleet.state.activate_node(node, 1000)
        grid = server.open_run()
        exchange = grid.exchange(instruct(grid, ids, weights(3_000_000)), deadline=0.3)
        assert list(exchange) == []
        record = weights(3_000_000)
        grid.push_messages(instruct(grid, ids, record))
        store = server.fleet.store
        offered = sum(len(store.get(object_id) or b"") for object_id in list(store.store))
        assert len(record["flat"].data) < offered < 1.01 * len(record["flat"].data)
        assert all(callable(entry.content) for entry in store.store.values())
        grid.close()
        assert empty(server)


def key_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return public_key_to_bytes(key.public_key())


def test_a_node_that_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    with fleet() as server:
        grid = server.open_run()
        with resident(app, tmp_path, address(server)):
            nodes = online(server, 1)
        wait_until(lambda: not server.nodes(), 10)
        began = time.monotonic()
        (reply,) = grid.exchange(instruct(grid, nodes), deadline=60)
        assert reply.error.code == ErrorCode.NODE_UNAVAILABLE
        assert reply.metadata.src_node_id == nodes[0]
        assert time.monotonic() - began < 10
        (reply,) = grid.exchange(instruct(grid, [12345]), deadline=60)
        assert reply.error.code == ErrorCode.NODE_UNAVAILABLE
        assert empty(server)


def test_nodes_are_trusted_after_a_pause_of_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FleetClient, "heartbeat", lambda self, ended: None)
    with fleet() as server, resident(app, tmp_path, address(server)):
        grid = server.open_run()
        nodes = online(server, 1)
        server.fleet.trust_after = time.monotonic() + 60
        server.fleet.state.nodes[nodes[0]].online_until = 1.0  # as after an hour without a heartbeat
        (reply,) = grid.exchange(instruct(grid, nodes, sleep=2), deadline=30)
        assert reply.has_content()
        server.fleet.trust_after = 0.0
        (reply,) = grid.exchange(instruct(grid, nodes, sleep=2), deadline=30)
        assert reply.error.code == ErrorCode.NODE_UNAVAILABLE


def test_a_thread_continues_after_an_unexpected_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull = FleetClient.pull
    faults = iter([RuntimeError("an unexpected error"), UpstreamRefusedError("no")])

    def stumble(self: FleetClient) -> Pulled | None:
        if fault := next(faults, None):
            raise fault
        return pull(self)

    monkeypatch.setattr(FleetClient, "pull", stumble)
    with fleet() as server, resident(app, tmp_path, address(server)):
        grid = server.open_run()
        (reply,) = grid.exchange(instruct(grid, online(server, 1)), deadline=30)
        assert reply.has_content()


def test_a_message_that_did_not_arrive_is_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = FleetClient.fetch
    faults = iter([UpstreamUnavailableError("the answer was lost on its way")])

    def lose(self: FleetClient, pulled: Pulled, give_up_at: float) -> Message:
        if fault := next(faults, None):
            raise fault
        return fetch(self, pulled, give_up_at)

    monkeypatch.setattr(FleetClient, "fetch", lose)
    with fleet() as server, resident(app, tmp_path, address(server)):
        grid = server.open_run()
        (reply,) = grid.exchange(instruct(grid, online(server, 1)), deadline=15)
        assert reply.has_content()
        assert next(faults, None) is None
        assert not server.fleet.unconfirmed


def test_a_small_message_and_its_reply_are_two_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, calls = SignedChannel.begin, []

    def count(self: SignedChannel, method: str, *rest: Any) -> Any:
        calls.append(method)
        return begin(self, method, *rest)

    with fleet() as server, resident(app, tmp_path, address(server)):
        grid = server.open_run()
        nodes = online(server, 1)
        list(grid.exchange(instruct(grid, nodes), deadline=20))  # the run is asked for once
        monkeypatch.setattr(SignedChannel, "begin", count)
        for _ in range(3):
            (reply,) = grid.exchange(instruct(grid, nodes), deadline=20)
            assert reply.has_content()
        assert sorted(set(calls)) == ["PullMessages", "PushMessages"]
        assert calls.count("PushMessages") == 3
        assert empty(server)


@pytest.mark.parametrize(
    "early",
    [
        lambda objects: [],
        lambda objects: objects[1:],
        lambda objects: [b"strange", *objects],
        lambda objects: [objects[0] + b"\0", *objects[1:]],
        lambda objects: [bytes(MAX_INLINE_BYTES), *objects],
    ],
    ids=["none", "not all", "a strange one", "a changed one", "too much"],
)
def test_what_did_not_come_with_a_reply_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, early: Callable[[list[bytes]], list[bytes]]
) -> None:
    monkeypatch.setattr(fleet_client, "select_inline", lambda packed: early(select_inline(packed)))
    with fleet() as server, resident(app, tmp_path, address(server)):
        grid = server.open_run()
        nodes = online(server, 1)
        for _ in range(2):
            (reply,) = grid.exchange(instruct(grid, nodes), deadline=20)
            values = numpy_view(reply.content.array_records["w"]["flat"])
            np.testing.assert_array_equal(values, np.full(256, 2, np.float32))
        assert empty(server)


def test_flowers_own_way_of_pushing_and_pulling(tmp_path: Path) -> None:
    with fleet() as server, resident(app, tmp_path, address(server)):
        grid = server.open_run()
        nodes = online(server, 1)
        grid.set_run(grid.run)
        ids = set(grid.push_messages(instruct(grid, nodes)))
        replies: list[Message] = []

        def pulled() -> bool:
            replies.extend(grid.pull_messages(ids))
            return bool(replies)

        wait_until(pulled, 20)
        assert {reply.metadata.reply_to_message_id for reply in replies} == ids
        assert len(list(grid.send_and_receive(instruct(grid, nodes), timeout=20))) == 1
        assert [node.node_id for node in grid.get_nodes()] == nodes
        assert empty(server)


def test_a_server_with_keys_admits_only_those(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "key").write_bytes(private_key_to_bytes(key))
    refused: list[str] = []

    def note(kind: str, facts: dict[str, Any]) -> None:
        if kind == "refused":
            assert facts["by_key"]
            refused.append(facts["reason"])

    with fleet(require_keys=True) as server:
        server.register_key(key_of(key), "edge-1")
        server.register_key(key_of(key), "edge-1")
        with pytest.raises(StateError, match="public key of 'x'"):
            server.register_key(b"nonsense", "x")
        with (
            resident(app, tmp_path / "a", address(server), key=tmp_path / "key") as known,
            resident(app, tmp_path / "b", address(server), on_event=note) as stranger,
        ):
            assert known.wait_connected(20)
            wait_until(lambda: refused, 20)
            assert "not registered there" in refused[0]
            assert not stranger.wait_connected(0)
            (node,) = server.nodes()
            assert (node.name, node.public_key) == ("edge-1", key_of(key))


def test_tls_and_health(tmp_path: Path, certificates: tuple[bytes, bytes, bytes]) -> None:
    with fleet(certificates=certificates) as server:
        node = ResidentNode(
            app,
            [Upstream(f"localhost:{server.port}", root_certificates=certificates[0])],
            tmp_path,
            node_config={},
        )
        thread = threading.Thread(target=node.run)
        thread.start()
        try:
            assert node.wait_connected(20)
        finally:
            node.stop()
            thread.join()
        credentials = grpc.ssl_channel_credentials(certificates[0])
        with grpc.secure_channel(f"localhost:{server.port}", credentials) as channel:
            answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=10)
            assert answer.status == HealthCheckResponse.SERVING


@pytest.fixture
def certificates() -> tuple[bytes, bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    return pem, pem, private_key_to_bytes(key)


def test_an_address_in_use() -> None:
    with fleet() as server:
        with pytest.raises(AddressError, match="cannot listen on"):
            InlineFleet(address(server)).start()
        with pytest.raises(AddressError, match="cannot listen on"):
            InlineFleet("no such host:1").start()


def test_two_homes_are_served_one_call_at_a_time(tmp_path: Path) -> None:
    with fleet() as one, fleet() as two, resident_process(tmp_path, address(one), address(two)) as process:
        grids = {server: server.open_run() for server in (one, two)}
        replies: list[Message] = []

        def ask(server: InlineFleet) -> None:
            nodes = online(server, 1)
            replies.extend(grids[server].exchange(instruct(grids[server], nodes, sleep=0.5), deadline=30))

        threads = [threading.Thread(target=ask, args=(server,)) for server in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(replies) == 2
        assert all(reply.has_content() for reply in replies)
        begin, end = process.lines("begin"), process.lines("end")
        assert begin[1]["at"] >= end[0]["at"]


def test_the_death_of_one_home_leaves_the_other_served(tmp_path: Path) -> None:
    with fleet() as one, resident_process(tmp_path, address(one), f"127.0.0.1:{free_port()}"):
        grid = one.open_run()
        replies = list(grid.exchange(instruct(grid, online(one, 1)), deadline=20))
        assert replies[0].has_content()


def test_a_side_message_is_answered_during_a_long_call(tmp_path: Path) -> None:
    def serve(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            started.set()
            release.wait(20)
        return Message(RecordDict({"m": MetricRecord({"n": 1})}), reply_to=message)

    started, release = threading.Event(), threading.Event()
    with (
        fleet() as server,
        resident(serve, tmp_path, address(server), side_types=frozenset({"query.progress"})),
    ):
        grid = server.open_run()
        nodes = online(server, 1)
        replies: list[Message] = []
        long_call = threading.Thread(
            target=lambda: replies.extend(grid.exchange(instruct(grid, nodes), deadline=30))
        )
        long_call.start()
        assert started.wait(20)
        (side,) = grid.exchange(instruct(grid, nodes, kind="query.progress"), deadline=10)
        assert side.has_content()
        assert not replies
        release.set()
        long_call.join()
        assert len(replies) == 1
