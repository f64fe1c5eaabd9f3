"""The monitoring service over gRPC."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from espalier.errors import AddressError, ConfigError
from espalier.monitor.health import check_health
from espalier.monitor.service import WATCHERS, MonitorServer
from espalier.security.transport import Security
from espalier_proto import monitor_pb2 as mpb
from espalier_proto.monitor_pb2_grpc import MonitorStub
from espalier_server.commands.status_client import ask_status, watch
from tests.support.event_log import status
from tests.support.processes import wait_until


@pytest.fixture
def server() -> Iterator[MonitorServer]:
    with MonitorServer("127.0.0.1:0", None, status, healthy=False) as running:
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
        with pytest.raises(AddressError, match=f"{WATCHERS} clients watch already"):
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
