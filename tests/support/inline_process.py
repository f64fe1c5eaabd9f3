"""An inline Fleet server as a process of its own, whose memory is measured: `... NODES ROUNDS DEADLINE SLEEPS SIZE`.

It waits for the nodes, runs the rounds with a running sum over the replies, and writes its resident memory (bytes) at
the start, after every tenth round, and at its highest (the kernel's high-water mark), as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import psutil
from flwr.app import ConfigRecord, RecordDict

from espalier.flower.arrays import array_from_numpy, numpy_view
from espalier_edge.fleet.server import InlineFleet
from tests.support.flower_helpers import empty, weights
from tests.support.processes import wait_until


def main() -> None:
    """Run the rounds."""
    nodes, rounds, deadline, size = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    slow = sys.argv[5] == "slow"
    server = InlineFleet("127.0.0.1:0")
    server.start()
    print(json.dumps({"port": server.port}), flush=True)
    wait_until(lambda: len(server.nodes()) == nodes, 120, "the nodes")
    grid = server.open_run()
    own = psutil.Process()
    seen = [own.memory_info().rss]
    total = np.zeros(size if not slow else 1, np.uint8)
    replies = 0
    for number in range(rounds):
        if slow:  # the last node drops out of every round, and has a payload of its own to leave behind
            plain = RecordDict({"w": weights(25_000), "do": ConfigRecord({})})
            late = RecordDict({"w": weights(25_000 + number), "do": ConfigRecord({"sleep": 2 * deadline})})
            ids = sorted(grid.get_node_ids())
            messages = [grid.create_message(plain, "train", node, "1") for node in ids[:-1]]
            messages.append(grid.create_message(late, "train", ids[-1], "1"))
        else:
            ask = RecordDict({"do": ConfigRecord({"reply": size})})
            messages = [grid.create_message(ask, "train", node, "1") for node in grid.get_node_ids()]
        for reply in grid.exchange(messages, deadline=deadline):
            assert reply.has_content(), reply
            values = numpy_view(reply.content.array_records["w"]["flat"])
            if not slow:
                np.add(total, values, out=total)
            replies += 1
            del reply, values
        del messages
        if number % 10 == 9:
            seen.append(own.memory_info().rss)
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    done = {"replies": replies, "rss": seen, "peak": peak, "abandoned": grid.abandoned, "late": grid.late}
    grid.close()
    wait_until(lambda: empty(server), 10)
    array_from_numpy(total)
    print(json.dumps(done), flush=True)
    server.stop()


if __name__ == "__main__":
    main()
