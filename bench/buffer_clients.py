"""Clients that reply without training, many in one process: ``python -m bench.buffer_clients STATE COUNT HOST:PORT``.

Replies are views of one shared buffer at different offsets (except for the first chunk, which contains a header), so
that many clients with large payloads fit into the memory of one machine. No reply is sent before all are ready.
"""

from __future__ import annotations

import signal
import sys
import threading
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, SType

from espalier.flower.payloads import chunk_head
from espalier.flower.resident import ResidentNode, Upstream
from espalier.wire import control
from espalier.wire.hello import device_facts
from espalier.wire.sections import MODEL, Payload
from espalier_proto import espalier_pb2 as pb

#: Distance between the views of two clients in the shared buffer, in values.
STRIDE = 1024
SAMPLES = 10
DTYPE = "float32"


class BufferClients:
    """State that all clients of the process share."""

    def __init__(self, count: int) -> None:
        self._ready = threading.Barrier(count)
        self._count = count
        self._lock = threading.Lock()
        self._numbers = np.zeros(0, np.float32)
        self._facts = device_facts("cpu")

    def answer(self, number: int, name: str, message: Message) -> Message:
        """Answer a hello or a plan as client `number`."""
        if message.metadata.message_type == control.HELLO:
            hello = pb.ClientHello(
                schema=control.SCHEMA,
                name=name,
                samples=SAMPLES,
                histogram=pb.LabelHistogram(counts=[SAMPLES]),
                facts=self._facts,
                image_shape=(1, 8, 8),
                classes=["0"],
            )
            return Message(control.control_content(hello), reply_to=message)
        plan = control.decode(pb.RoundPlan, control.plan_bytes(message), "edge")
        weights = control.read_payload(message, control.plan_sections(plan, "edge"), "edge")[MODEL]
        record = self._record(number, weights.buffers[DTYPE].size)
        message.content = RecordDict()  # release the received payload while the other clients prepare theirs
        del weights
        report = pb.ClientReport(
            schema=control.SCHEMA,
            run=plan.run,
            window=plan.window,
            round=plan.round,
            client=plan.client,
            samples=SAMPLES,
            steps=1,
        )
        self._ready.wait()
        return Message(
            control.report_content(report, Payload({}, {control.ARRAYS: record}), SAMPLES, 0.0),
            reply_to=message,
        )

    def _record(self, number: int, length: int) -> ArrayRecord:
        """Return a payload whose chunks are views of the shared buffer, except for the first one."""
        with self._lock:
            if self._numbers.size != length + self._count * STRIDE:
                drawn = np.random.default_rng().random(length + self._count * STRIDE, np.float32)
                self._numbers = drawn
        values = self._numbers[number * STRIDE :][:length]
        head = BytesIO()
        np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(values))
        body = values.view(np.uint8).data
        size = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
        first = size - len(head.getvalue())  # Flower's first chunk: the header, then data
        array_chunks = [ArrayChunk(memoryview(head.getvalue() + bytes(body[:first])))]
        array_chunks += [ArrayChunk(body[start : start + size]) for start in range(first, len(body), size)]
        record = ArrayRecord({DTYPE: Array(dtype=DTYPE, shape=(length,), stype=SType.NUMPY, data=b"")})
        chunks = []
        for chunk in array_chunks:
            digest = sha256(chunk_head(len(chunk.data)))
            digest.update(chunk.data)
            chunks.append((digest.hexdigest(), chunk))
        record[DTYPE].__dict__["_chunks"] = chunks
        return record


def main() -> None:
    """Serve until SIGTERM."""
    folder, count, edge = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    shared = BufferClients(count)
    nodes = []
    for number in range(count):
        name = f"{folder.name}-{number}"

        def app(message: Message, context: Context, number: int = number, name: str = name) -> Message:
            del context
            return shared.answer(number, name, message)

        nodes.append(ResidentNode(app, [Upstream(edge, insecure=True)], folder / str(number), node_config={}))

    def stop(*_: object) -> None:
        for node in nodes:
            node.stop()

    signal.signal(signal.SIGTERM, stop)
    threads = [threading.Thread(target=node.run) for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(1.0)  # return regularly so that signal handlers run


if __name__ == "__main__":
    main()
