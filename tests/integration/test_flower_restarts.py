"""Plugs pulled: a killed node comes back with its key, a restarted server gets its nodes back, heartbeats go on."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from flwr.app import Context, Message, RecordDict

from espalier_edge.fleet.uploads import Upload
from tests.support.flower_helpers import empty, fleet, instruct, online, resident, resident_process
from tests.support.paths import ROOT
from tests.support.processes import free_port, wait_until
from tests.support.resident_process import app


def test_a_killed_node_returns_with_its_state_and_message(
    tmp_path: Path,
) -> None:
    with fleet() as server:
        address = f"127.0.0.1:{server.port}"
        grid = server.open_run()
        with resident_process(tmp_path, address) as first:
            nodes = online(server, 1)
            (reply,) = grid.exchange(instruct(grid, nodes), deadline=20)
            assert reply.content["m"]["calls"] == 1
            replies: list[Message] = []
            thread = threading.Thread(
                target=lambda: replies.extend(grid.exchange(instruct(grid, nodes, sleep=1), deadline=60))
            )
            thread.start()
            wait_until(lambda: len(first.lines("begin")) == 2, 20, "the second call")
            first.kill()
        began = time.monotonic()
        with resident_process(tmp_path, address) as second:
            wait_until(lambda: second.lines("connected"), 20, "the node")
            assert second.lines("connected")[0]["node_id"] == nodes[0]
            assert time.monotonic() - began < 10  # the lease of the killed process lasts 20 s
            thread.join(30)
            (reply,) = replies
            assert reply.has_content(), reply
            assert reply.content["m"]["calls"] == 2
        assert grid.abandoned == 0
        assert empty(server)


def test_a_second_process_on_the_same_state_says_so(tmp_path: Path) -> None:
    with fleet() as server, resident_process(tmp_path, f"127.0.0.1:{server.port}"):
        online(server, 1)
        command = [
            sys.executable,
            "-m",
            "tests.support.resident_process",
            str(tmp_path / "state"),
            "127.0.0.1:1",
        ]
        root = ROOT
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root)
        assert second.returncode == 5
        assert second.stderr.count("\n") == 1
        assert "in use by process" in second.stderr


def test_a_node_that_is_connected_twice_counts_once(tmp_path: Path) -> None:
    said: list[str] = []

    def named(name: str) -> Callable[[Message, Context], Message]:
        def answer(message: Message, context: Context) -> Message:
            said.append(name)
            return Message(RecordDict(), reply_to=message)

        return answer

    with fleet() as server:
        address = f"127.0.0.1:{server.port}"
        with resident(named("first"), tmp_path / "first", address) as first:
            assert first.wait_connected(20)  # by then it has written down its node id
            [node] = online(server, 1)
            shutil.copytree(tmp_path / "first", tmp_path / "copy", ignore=shutil.ignore_patterns("lock"))
            refused: list[str] = []
            with resident(named("copy"), tmp_path / "copy", address) as copy, ExitStack() as later:
                # Only then the third: between the end of the first one's lease and the copy's it would be let in.
                assert copy.wait_connected(20)
                later.enter_context(
                    resident(
                        named("other"),
                        tmp_path / "other",
                        address,
                        key=tmp_path / "first" / "node.key",
                        on_event=lambda kind, facts: refused.append(kind),
                    )
                )
                wait_until(lambda: "refused" in refused, 20, "a refusal of the same key")
                assert online(server, 1) == [node]
                grid = server.open_run()
                for _ in range(6):
                    [reply] = grid.exchange(instruct(grid, [node]), deadline=20)
                    assert reply.has_content()
                assert len(said) == 6
                assert "other" not in said


def test_a_restarted_server_gets_its_nodes_back(tmp_path: Path) -> None:
    port = free_port()
    with resident(app, tmp_path, f"127.0.0.1:{port}"):
        ids = []
        for _ in range(2):
            with fleet(f"127.0.0.1:{port}") as server:
                ids += online(server, 1)
                grid = server.open_run()
                (reply,) = grid.exchange(instruct(grid, ids[-1:]), deadline=20)
                assert reply.has_content()
        assert ids[0] != ids[1]


def test_heartbeats_go_on_during_a_long_call_and_a_long_upload(tmp_path: Path) -> None:
    with fleet(upload_slots=1) as server, resident(app, tmp_path / "a", f"127.0.0.1:{server.port}"):
        grid = server.open_run()
        nodes = online(server, 1)
        leases: set[float] = set()
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.2):
                leases.add(float(server.fleet.state.nodes[nodes[0]].online_until))

        # The only upload slot is taken, so that the upload has to wait.
        server.fleet.uploads.admit(Upload(0, "somebody else", big=True), lambda: True)
        threading.Timer(20, lambda: server.fleet.uploads.release("somebody else")).start()
        server.fleet.uploads._stall = 1000
        watcher = threading.Thread(target=watch)
        watcher.start()
        (reply,) = grid.exchange(instruct(grid, nodes, sleep=10, reply=12_000_000), deadline=60)
        done.set()
        watcher.join()
        assert reply.has_content()
        assert len(leases) >= 3  # one from joining; then about every 8 s


def test_a_dead_uploader_frees_its_slot(tmp_path: Path) -> None:
    with fleet(upload_slots=1) as server:
        server.fleet.uploads._stall = 1.0
        address = f"127.0.0.1:{server.port}"
        with resident_process(tmp_path / "a", address) as dying, resident(app, tmp_path / "b", address):
            grid = server.open_run()
            nodes = online(server, 2)
            for node in nodes:
                (reply,) = grid.exchange(instruct(grid, [node]), deadline=20)
                if len(dying.lines("begin")) == 1:
                    victim = node
                    break
            (other,) = [node for node in nodes if node != victim]
            replies: list[Message] = []
            messages = instruct(grid, [victim], reply=300_000_000)
            thread = threading.Thread(target=lambda: replies.extend(grid.exchange(messages, deadline=40)))
            thread.start()
            wait_until(lambda: server.fleet.uploads._free == 0, 30, "the upload")
            dying.kill()
            (reply,) = grid.exchange(instruct(grid, [other], reply=12_000_000), deadline=30)
            assert reply.has_content()
            grid.close()
            thread.join(30)
            assert not thread.is_alive()
            assert empty(server)
