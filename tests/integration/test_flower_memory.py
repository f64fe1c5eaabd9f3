"""Memory does not grow: with the number of clients of a round, nor with the number of rounds and stragglers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from flwr.app import ConfigRecord, Message, RecordDict

from espalier_server.superlink.grid import TreeGrid
from tests.support.flower_helpers import resident_process, weights
from tests.support.paths import ROOT
from tests.support.processes import app_bundle, environment, running, serverapp_grid, superlink, wait_until

MB = 1_000_000
CLIENT = "from flwr.clientapp import ClientApp\napp = ClientApp()\n"


def measured(folder: Path, nodes: int, rounds: int, deadline: float, size: int, kind: str) -> dict[str, Any]:
    """Run the server and its nodes, each in a process; return what the server measured."""
    folder.mkdir()
    log = folder / "server"
    root = ROOT
    numbers = [str(number) for number in (nodes, rounds, deadline, size)]
    command = [sys.executable, "-m", "tests.support.inline_process", *numbers, kind]
    env = environment(folder, PYTHONPATH=str(root), OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    with running(command, log, env) as server:

        def lines() -> list[dict[str, Any]]:
            assert server.poll() in (None, 0), log.read_text()
            return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]

        wait_until(lambda: log.exists() and lines(), 60, "the server")
        address = f"127.0.0.1:{lines()[0]['port']}"
        with resident_process(folder / "nodes", address, more=["--nodes", str(nodes)]):
            wait_until(lambda: len(lines()) == 2, 200, "the end of the rounds")
            return lines()[1]


def test_memory_does_not_grow_with_the_number_of_replies(tmp_path: Path) -> None:
    payload = 40 * MB
    few = measured(tmp_path / "few", 4, 1, 150, payload, "big")
    many = measured(tmp_path / "many", 32, 1, 150, payload, "big")
    assert (few["replies"], many["replies"]) == (4, 32)
    # Chunks on the way to 32 clients instead of 4 take room, too: up to two of 5 MiB a client.
    assert many["peak"] - few["peak"] < 3 * payload, (few, many)


def test_stragglers_leave_no_memory_at_an_inline_server(tmp_path: Path) -> None:
    done = measured(tmp_path / "run", 3, 300, 0.07, 0, "slow")
    assert done["abandoned"] >= 250
    assert done["late"] > 10
    early, last = done["rss"][5], done["rss"][-1]  # after 50 rounds and after 300
    assert last - early < 10 * MB, done["rss"]  # 250 payloads of 100 KB left behind would be 25 MB


def test_stragglers_leave_no_memory_at_a_stock_superlink(tmp_path: Path) -> None:
    rounds, deadline = 300, 0.06
    with (
        superlink(tmp_path / "link") as link,
        serverapp_grid(link, app_bundle(CLIENT)) as http,
        resident_process(tmp_path / "nodes", link.fleet, more=["--nodes", "2"]),
    ):
        grid = TreeGrid(http)
        wait_until(lambda: len(list(grid.get_node_ids())) == 2, 30, "the nodes")
        nodes = sorted(grid.get_node_ids())
        memory = []
        for number in range(rounds):
            if number % 10 == 0:
                memory.append(psutil.Process(link.pid).memory_info().rss)
            late = RecordDict({"w": weights(25_000 + number), "do": ConfigRecord({"sleep": 2 * deadline})})
            plain = RecordDict({"do": ConfigRecord({})})
            messages = [Message(plain, node, "train") for node in nodes[:-1]] + [
                Message(late, nodes[-1], "train")
            ]
            list(grid.exchange(messages, deadline=deadline))
        assert grid.abandoned >= 250

        def collected() -> bool:
            grid.collect_late()
            return grid.late > 0

        wait_until(collected, 10, "late replies")
        assert memory[-1] - memory[5] < 12 * MB, memory


JOINING = """
import sys
from pathlib import Path
import numpy as np
from espalier.flower.arrays import array_from_numpy
from espalier.flower.memory import unmap_large_blocks_on_free
from espalier.flower.payloads import pack, unpack
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

def status(key):
    return 1024 * int(Path("/proc/self/status").read_text().partition(key)[2].split()[0])

unmap_large_blocks_on_free()
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
numbers = np.random.default_rng(0).random(int(sys.argv[1]) // 4, np.float32)
packed = pack(Message(RecordDict({"w": ArrayRecord({"w": array_from_numpy(numbers)})}), 1, "train"))
message_id, contents = packed.message_id, {i: packed.content(i) for i in packed.objects}
beyond = np.ones(1 << 18)  # behind the chunks, so that the heap does not end with them
del packed
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS:")
message = unpack(message_id, contents)
assert len(message.content["w"]["w"].data) > numbers.nbytes
print(status("VmHWM:") - before)
"""


def test_a_big_payload_is_joined_without_a_second_copy() -> None:
    size = 120 * MB
    done = subprocess.run(
        [sys.executable, "-c", JOINING, str(size)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert int(done.stdout) < size / 4  # the chunks' pages go back while the Array grows
