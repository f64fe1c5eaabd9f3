"""A resident node as a process of its own: `python -m tests.support.resident_process STATE HOME...`.

Its app adds one to every value of the array record "w", counts its calls in the context's state, and obeys the
message's config record "do": sleep (s), fail, reply (bytes of random data instead of "w"). It writes a line of JSON for
every event, and for every call when it begins and ends.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from espalier.errors import EspalierError
from espalier.flower.arrays import array_from_numpy, numpy_view
from espalier.flower.resident import ResidentNode, Upstream

LOCK = threading.Lock()


def say(kind: str, facts: dict[str, Any]) -> None:
    """Write a line."""
    with LOCK:
        print(json.dumps({"kind": kind, "at": time.time(), **facts}), flush=True)


def app(message: Message, context: Context) -> Message:
    """Do what the message says."""
    do = message.content.config_records.get("do", ConfigRecord())
    say("begin", {"type": message.metadata.message_type})
    calls = 1 + int(str(context.state.config_records.get("n", ConfigRecord({"calls": 0}))["calls"]))
    if message.metadata.message_type == "train":
        context.state["n"] = ConfigRecord({"calls": calls})
    time.sleep(float(str(do.get("sleep", 0.0))))
    if do.get("fail"):
        raise RuntimeError("told to\nfail")
    content = RecordDict({"m": MetricRecord({"num-examples": 1, "calls": calls})})
    seen = {"run_config": json.dumps(context.run_config), "node_config": json.dumps(context.node_config)}
    content["seen"] = ConfigRecord({**seen, "keys": ",".join(message.content)})
    if size := int(str(do.get("reply", 0))):
        data = np.random.default_rng().bytes(size)
        content["w"] = ArrayRecord({"flat": array_from_numpy(np.frombuffer(data, np.uint8))})
    elif "w" in message.content:
        values = {
            name: array_from_numpy(numpy_view(a) + 1)
            for name, a in message.content.array_records["w"].items()
        }
        content["w"] = ArrayRecord(values)
    say("end", {"type": message.metadata.message_type})
    return Message(content, reply_to=message)


def main() -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("state", type=Path)
    parser.add_argument("upstreams", nargs="+")
    parser.add_argument("--side", nargs="*", default=[])
    parser.add_argument("--nodes", type=int, default=1)
    arguments = parser.parse_args()
    upstreams = [Upstream(address, insecure=True) for address in arguments.upstreams]
    nodes = []
    try:
        for index in range(arguments.nodes):
            state = arguments.state / str(index) if arguments.nodes > 1 else arguments.state
            config = {"index": index}
            side = frozenset(arguments.side)
            nodes.append(
                ResidentNode(app, upstreams, state, node_config=config, side_types=side, on_event=say)
            )
    except EspalierError as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code

    def stop(*_: object) -> None:
        for node in nodes:
            node.stop()

    signal.signal(signal.SIGTERM, stop)
    threads = [threading.Thread(target=node.run) for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
