"""Health: what gRPC answers, what a state folder tells, and the exit status of `espalier health`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from espalier.cli import command_line
from espalier.errors import AddressError, EspalierError, StateError
from espalier.monitor.health import check_health
from espalier.monitor.node_status import STALE, STATUS_FILE, NodeStatus, connected_upstreams
from espalier.security.transport import Security
from espalier.storage.lock import FolderLock
from espalier_edge.fleet.server import InlineFleet
from tests.support.processes import free_port

HOME = "127.0.0.1:9093"


@pytest.fixture(scope="module")
def edge() -> Iterator[str]:
    fleet = InlineFleet("127.0.0.1:0")
    fleet.start()
    yield f"127.0.0.1:{fleet.port}"
    fleet.stop()


def test_a_serving_port_is_well(edge: str) -> None:
    check_health(edge, Security())
    done = CliRunner().invoke(command_line(), ["health", edge])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{edge} is serving\n"


def test_where_nobody_listens() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(AddressError, match=f"{address}: no answer"):
        check_health(address, Security())
    done = CliRunner().invoke(command_line(), ["health", address])
    assert done.exit_code == 1
    assert done.stderr.startswith("unhealthy: ")


def test_a_port_without_the_service_says_so() -> None:
    """As the Fleet port of a stock SuperLink."""
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(AddressError, match="no such service"):
            check_health(f"127.0.0.1:{port}", Security())
    finally:
        server.stop(None).wait()


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    lock = FolderLock(tmp_path)
    yield tmp_path
    lock.release()


def test_a_node_is_well_while_one_home_is_connected(state: Path) -> None:
    heard: list[str] = []
    with NodeStatus(state, [HOME, "b:1"], lambda kind, facts: heard.append(kind)) as status:
        with pytest.raises(StateError, match=r"connected to no server: 127\.0\.0\.1:9093 \(not yet\)"):
            connected_upstreams(state)
        status("connected", {"upstream": HOME, "node_id": 1})
        status("unreachable", {"upstream": "b:1", "reason": "refused"})
        assert connected_upstreams(state) == [HOME]
        done = CliRunner().invoke(command_line(), ["health", "--state", str(state)])
        assert (done.exit_code, done.stdout) == (0, f"connected to {HOME}\n")
        # A call that is refused leaves the connection; one that is lost does not.
        status("refused", {"upstream": HOME, "reason": "too big"})
        assert connected_upstreams(state) == [HOME]
        status("disconnected", {"upstream": HOME, "reason": "socket closed"})
        with pytest.raises(StateError, match="socket closed"):
            connected_upstreams(state)
    assert heard == ["connected", "unreachable", "refused", "disconnected"]
    assert not (state / STATUS_FILE).exists()


def test_a_node_that_is_stopped_or_gone_is_not_well(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no process holds"):
        connected_upstreams(tmp_path)
    lock = FolderLock(tmp_path)
    with pytest.raises(StateError, match="cannot be read"):
        connected_upstreams(tmp_path)
    path = tmp_path / STATUS_FILE
    path.write_text(json.dumps({"pid": 1, "homes": {HOME: {"connected": True, "since": 1.0, "reason": ""}}}))
    assert connected_upstreams(tmp_path) == [HOME]
    old = path.stat().st_mtime - STALE - 5
    os.utime(path, (old, old))
    with pytest.raises(StateError, match="has not responded"):
        connected_upstreams(tmp_path)
    lock.release()
    with pytest.raises(EspalierError, match="no process holds"):
        connected_upstreams(tmp_path)


def test_what_a_node_did_is_counted(tmp_path: Path) -> None:
    status = NodeStatus(tmp_path, [HOME])
    status("message", {"upstream": HOME, "message_type": "train", "run_id": 1, "group_id": "1"})
    assert status.busy_with == "train"
    status("reply", {"upstream": HOME, "message_type": "train", "seconds": 1.5, "wanted": True})
    status("message", {"upstream": HOME, "message_type": "train", "run_id": 1, "group_id": "2"})
    status("error", {"upstream": HOME, "message_type": "train", "reason": "ValueError"})
    status("reply", {"upstream": HOME, "message_type": "train", "seconds": 0.5, "wanted": True})
    assert (status.answered["train"], status.failed["train"], status.seconds["train"]) == (2, 1, 2.0)
    assert status.busy_with == ""


@pytest.mark.parametrize("arguments", [[], ["127.0.0.1:1", "--state", "s"]])
def test_one_of_both_must_be_given(arguments: list[str]) -> None:
    done = CliRunner().invoke(command_line(), ["health", *arguments])
    assert done.exit_code != 0
    assert "either HOST:PORT or --state DIR" in str(done.exception)
