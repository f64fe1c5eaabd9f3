"""The process that `bench.aggregate` measures: ``python -m bench.aggregation_process edge|fedavg …``.

``edge STATE CLIENTS BYTES TENSORS`` prints its port, waits for its clients, serves one window of one round with the
code of `espalier edge`, and prints memory and seconds as JSON. ``fedavg CLIENTS BYTES TENSORS`` aggregates replies
that it creates itself.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from bench.waiting import wait_until
from espalier.wire import control
from espalier.wire.payload import Layout, TensorSpec, Weights
from espalier.wire.sections import Payload
from espalier_proto import espalier_pb2 as pb

#: How long an edge waits for its clients and for a round, in seconds.
TIMEOUT = 600.0


def layout_of(size: int, tensors: int) -> Layout:
    """Return the layout of `tensors` equal tensors of `size` bytes together."""
    return Layout(tuple(TensorSpec(f"block{i}", "float32", (size // 4 // tensors,)) for i in range(tensors)))


def initial_weights(layout: Layout) -> Weights:
    """Return random weights that a round starts from."""
    start = Weights.blank(layout)
    np.random.default_rng(1).random(out=start.buffers["float32"], dtype=np.float32)
    return start.frozen()


def peak() -> int:
    """Return the largest resident memory of this process since :func:`reset_peak`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def reset_peak() -> int:
    """Reset the kernel's record of peak memory; return the current resident memory in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(psutil.Process().memory_info().rss)


def edge(state: Path, clients: int, size: int, tensors: int) -> dict[str, Any]:
    """Serve one round as `espalier edge` does, without the link to a cloud."""
    from bench.local_grid import LocalCloud
    from espalier.methods.run_config import RunConfig
    from espalier_edge.app import EdgeApp
    from espalier_edge.fleet.server import InlineFleet

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    fleet = InlineFleet("127.0.0.1:0")
    fleet.start()
    print(fleet.port, flush=True)
    app = EdgeApp("edge", fleet, state, LocalCloud())
    wait_until(lambda: len(fleet.nodes()) == clients, TIMEOUT, "the clients")
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    layout = layout_of(size, tensors)
    hello = app(
        _message(control.HELLO, RecordDict({control.CONFIG: ConfigRecord({"run": "bench"})})), context
    )
    known = control.read_control(pb.EdgeHello, hello, "edge")
    plan = pb.WindowPlan(
        schema=control.SCHEMA,
        run="bench",
        window=1,
        settings=RunConfig.from_flat(
            {"method": "fedavg", "model": "cnn", "require-signatures": False}
        ).to_struct(),
        architecture=pb.ArchitectureSpec(tensors=layout.to_proto().tensors),
        round_deadline=TIMEOUT,
        quorum=clients,
        population=clients,
    )
    schedule = plan.rounds.add(round=1)
    for client in known.clients:
        schedule.participants.add(client=client.name, edge="edge")
    # As received over a link: one Array, of which the edge holds views.
    message = _message(control.TRAIN, control.plan_content(plan, Payload.of(initial_weights(layout))))
    idle = reset_peak()
    began, worked = time.perf_counter(), time.process_time()
    reply = app(message, context)
    measured = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - worked}
    highest = peak()
    report = control.read_control(pb.EdgeReport, reply, "edge")
    if len(report.rounds[0].clients) != clients:
        raise RuntimeError(
            f"{len(report.rounds[0].clients)} of {clients} replies were aggregated: {report.faults}"
        )
    app.close()
    fleet.stop(0.2)
    return {"idle": idle, "peak": highest, **measured}


def fedavg(clients: int, size: int, tensors: int) -> dict[str, Any]:
    """Aggregate replies with Flower's FedAvg, which needs all of them at once."""
    from flwr.serverapp.strategy import FedAvg

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    layout = layout_of(size, tensors)
    request = _message(control.TRAIN, RecordDict())
    idle = reset_peak()
    replies = []
    for _ in range(clients):
        arrays = ArrayRecord(
            {name: Array(np.asarray(a)) for name, a in initial_weights(layout).views().items()}
        )
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 10})})
        replies.append(Message(content, reply_to=request))
    began, worked = time.perf_counter(), time.process_time()
    FedAvg().aggregate_train(1, replies)
    measured = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - worked}
    return {"idle": idle, "peak": peak(), **measured}


def _message(kind: str, content: RecordDict) -> Message:
    return Message(content, 1, kind, ttl=2 * TIMEOUT)


def main() -> None:
    """Run the measurement named by the arguments and print its result as a line of JSON."""
    if sys.argv[1] == "edge":
        found = edge(Path(sys.argv[2]), *cast(Any, map(int, sys.argv[3:])))
    else:
        found = fedavg(*cast(Any, map(int, sys.argv[2:])))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
