"""Messages between the cloud and its edges outside a window: hello, refusal, progress and the end of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

from flwr.app import ConfigRecord, Message, RecordDict

from espalier.config.timeouts import EDGE_REFUSAL, WATCH_CALL
from espalier.errors import WireError
from espalier.wire import control
from espalier_proto import espalier_pb2 as pb
from espalier_server.superlink.grid import TreeGrid

log = logging.getLogger("espalier.cloud")

#: Seconds between polls for replies outside a window.
POLL_INTERVAL = 0.3
#: Seconds that the cloud waits for the edges to confirm the end of a run.
DONE_DEADLINE = 10.0


def hello_messages(run: str, histogram_epsilon: float, nodes: Sequence[int]) -> Iterator[Message]:
    """Yield the message that requests a hello from each node."""
    request = ConfigRecord({"run": run, "histogram-epsilon": histogram_epsilon})
    for node in nodes:
        yield Message(RecordDict({control.CONFIG: request}), node, control.HELLO)


def send_refusals(grid: TreeGrid, run: str, refusals: Mapping[int, Mapping[str, str]]) -> None:
    """Send refused clients the reason through an edge, so that it appears in their logs.

    Parameters
    ----------
    grid : TreeGrid
        The run's grid.
    run : str
        Espalier's run id.
    refusals : mapping of int to mapping of str to str
        For each edge's node id, the reason by client.
    """
    if not refusals:
        return
    messages = []
    for node, reasons in refusals.items():
        record = ConfigRecord({"run": run, "clients": list(reasons), "faults": list(reasons.values())})
        messages.append(Message(RecordDict({control.CONFIG: record}), node, control.REFUSAL))
    for reply in grid.exchange(messages, deadline=EDGE_REFUSAL):
        if reply.has_error():
            log.warning(
                "node %s did not forward a refusal: %s", reply.metadata.src_node_id, reply.error.reason
            )


def request_progress(
    grid: TreeGrid, run: str, window: int, nodes: Sequence[int], name_of: Callable[[int], str]
) -> dict[int, pb.Progress]:
    """Return the progress of each edge by node id; an edge that is still at an earlier window abandons it.

    Parameters
    ----------
    grid : TreeGrid
        The run's grid.
    run : str
        Espalier's run id.
    window : int
        The window in progress.
    nodes : sequence of int
        Node ids of the edges.
    name_of : callable
        Returns the name of an edge for error messages.
    """
    record = ConfigRecord({"run": run, "window": window})
    messages = [Message(RecordDict({control.CONFIG: record}), node, control.PROGRESS) for node in nodes]
    found = {}
    for reply in grid.exchange(messages, deadline=WATCH_CALL, first_wait=POLL_INTERVAL):
        node = reply.metadata.src_node_id
        if reply.has_error():
            continue
        try:
            found[node] = control.read_control(pb.Progress, reply, name_of(node))
        except WireError as error:  # the replies of other edges remain valid
            log.warning("%s", error)
    return found


def send_done(grid: TreeGrid, nodes: Sequence[int]) -> None:
    """Notify the edges that the run has ended."""
    messages = [Message(RecordDict(), node, control.DONE) for node in nodes]
    for reply in grid.exchange(messages, deadline=DONE_DEADLINE):
        if reply.has_error():
            log.warning(
                "node %s did not confirm the end of the run: %s",
                reply.metadata.src_node_id,
                reply.error.reason,
            )
