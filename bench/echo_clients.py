"""Clients that return scaled tensors without training: ``python -m bench.echo_clients STATE COUNT HOST:PORT…``.

They reply to a plan with the received tensors times a constant, so that the time of a round is that of the tree.
Hellos, reports and signatures are those of a real client. The process runs COUNT nodes as `espalier client --replicas`
does, each with its own key and state, assigned to the edges in turn; once all are connected it writes STATE/ready.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import sys
import time
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from google.protobuf.struct_pb2 import Struct

from espalier.flower.memory import retain_freed_blocks
from espalier.flower.node_resources import NodeResources
from espalier.flower.resident import ResidentNode, Upstream
from espalier.methods.registry import create_method
from espalier.methods.run_config import RunConfig
from espalier.methods.views import buffers_of
from espalier.processes.signals import stop_on_signals
from espalier.seeds import rng_for
from espalier.wire import control
from espalier.wire.codec import Codec
from espalier.wire.codec_registry import create_codec
from espalier.wire.downlink import read_downlink
from espalier.wire.hello import device_facts
from espalier.wire.payload import Weights
from espalier.wire.sections import Payload
from espalier.wire.uplink import UplinkEncoding
from espalier_client.device import Device
from espalier_client.replicas import CHANNELS_PER_CONNECTION, EXEMPT_TYPES, Replicas
from espalier_client.reply import pack_reply
from espalier_proto import espalier_pb2 as pb

#: The data that every client reports: one image of the digits' shape, of the first class.
SHAPE, CLASSES = (1, 8, 8), tuple("0123456789")
#: A query that a client answers with the Unix time, in seconds, at which it arrived.
WAKE = "query.wake"


class EchoClient:
    """A client whose update is the received tensors times a factor of its own.

    Every update is therefore a different object, which the edge does not have yet.

    Parameters
    ----------
    name : str
        Its name.
    state : Path
        Folder of its node key.
    number : int
        Index of the client in the process.
    """

    def __init__(self, name: str, state: Path, number: int) -> None:
        self._device = Device(name, data="", device="cpu", state=None, key=state / "node.key")
        self._factor = np.float32(1.0 - 1e-6 * (1 + number))

    def __call__(self, message: Message, context: Context) -> Message:
        """Reply to a hello, a wake-up query, or a plan."""
        if message.metadata.message_type == WAKE:
            return Message(RecordDict({"came": ConfigRecord({"at": time.time()})}), reply_to=message)
        if message.metadata.message_type == control.HELLO:
            return Message(control.control_content(self._hello()), reply_to=message)
        plan = control.decode(pb.RoundPlan, control.plan_bytes(message), "edge")
        settings, codec = parsed_settings(plan.settings.SerializeToString(deterministic=True))
        received = read_downlink(message, plan, settings, "edge")
        update = Payload(
            {
                section: Weights(
                    weights.layout, {kind: flat * self._factor for kind, flat in weights.buffers.items()}
                )
                for section, weights in received.items()
            }
        )
        if codec is not None:
            buffers = buffers_of(plan.architecture)
            encoding = UplinkEncoding(update.layouts, received.layouts, buffers, codec)
            rng = rng_for(settings.seed, self._device.name, plan.round, "codec")
            update = encoding.payload(update.views(), received.views(), rng)
        report = pb.ClientReport(
            schema=control.SCHEMA,
            run=plan.run,
            window=plan.window,
            round=plan.round,
            client=self._device.name,
            samples=1,
            steps=1,
            metrics={"lr-sum": 1.0},
        )
        return Message(pack_reply(self._device, plan, report, update), reply_to=message)

    def _hello(self) -> pb.ClientHello:
        counts = [1.0] + [0.0] * (len(CLASSES) - 1)
        return pb.ClientHello(
            schema=control.SCHEMA,
            name=self._device.name,
            samples=1,
            histogram=pb.LabelHistogram(counts=counts),
            facts=cached_device_facts(),
            image_shape=SHAPE,
            classes=CLASSES,
            data="numeric",
        )


@functools.lru_cache(maxsize=2)
def parsed_settings(data: bytes) -> tuple[RunConfig, Codec | None]:
    """Parse a plan's settings, once for all clients of the process; also return the codec of their updates."""
    settings = RunConfig.from_struct(Struct.FromString(data))
    name = create_method(settings).chosen(settings, "codec")
    return settings, None if name == "none" else create_codec(settings, name)


@functools.cache
def cached_device_facts() -> pb.DeviceFacts:
    """Describe this machine once for all clients of the process."""
    return device_facts("cpu")


def main() -> None:
    """Serve until SIGTERM."""
    retain_freed_blocks()  # as `espalier client` does
    folder, count, edges = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    stopped: queue.SimpleQueue[None] = queue.SimpleQueue()
    stop_on_signals(lambda: stopped.put(None))
    resources = NodeResources(CHANNELS_PER_CONNECTION, exclusive=True, exempt=EXEMPT_TYPES)
    nodes = []
    for number in range(count):
        state = folder / f"{number:04d}"
        app = EchoClient(f"{folder.name}-{number:04d}", state, number)
        upstreams = [Upstream(edges[number % len(edges)], insecure=True)]
        nodes.append(ResidentNode(app, upstreams, state, node_config={}, resources=resources))
    with Replicas(nodes, resources):
        for node in nodes:
            node.wait_connected(60)
        (folder / "ready").touch()
        while True:
            with contextlib.suppress(queue.Empty):
                stopped.get(timeout=1.0)
                return


if __name__ == "__main__":
    main()
