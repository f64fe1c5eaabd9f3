"""A lower bound for rounds: the same bytes over a plain gRPC stream, down to each client and up again.

``python -m bench.stream HOST:PORT BYTES [ROOT_CERTIFICATES]`` is a client; :func:`streamed` runs server and clients.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc

from bench.edge_rounds import ROOT, certificate
from bench.stock import environment, running

CHUNK = 1 << 20  # bytes of a message
METHOD = "/bench.Stream/Exchange"


def chunks(data: bytes) -> Iterator[bytes]:
    """Yield `data` in messages of `CHUNK` bytes."""
    for start in range(0, len(data), CHUNK):
        yield data[start : start + CHUNK]


class _Rounds:
    """A server that starts each round once all clients are connected, and times it."""

    def __init__(self, clients: int, data: bytes, rounds: int) -> None:
        self._data = data
        self._rounds = rounds
        self._began = 0.0
        self.seconds: list[float] = []
        self._start = threading.Barrier(clients, action=self._begin)
        self._end = threading.Barrier(clients, action=self._finish)
        self.done = threading.Event()

    def _begin(self) -> None:
        self._began = time.perf_counter()

    def _finish(self) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        if len(self.seconds) == self._rounds:
            self.done.set()

    def exchange(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """Send the data and receive as many bytes, once per round."""
        del context
        for _ in range(self._rounds):
            self._start.wait()
            yield from chunks(self._data)
            left = len(self._data)
            while left > 0:
                left -= len(next(requests))
            self._end.wait()


def streamed(folder: Path, clients: int, size: int, rounds: int, *, tls: bool) -> list[float]:
    """Return the seconds of rounds that send `size` bytes to each client and receive them back."""
    folder.mkdir(parents=True)
    served = _Rounds(clients, bytes(size), 1 + rounds)
    handler = grpc.method_handlers_generic_handler(
        "bench.Stream", {"Exchange": grpc.stream_stream_rpc_method_handler(served.exchange)}
    )
    server = grpc.server(ThreadPoolExecutor(2 * clients))
    server.add_generic_rpc_handlers((handler,))
    options = []
    if tls:
        pair = certificate()
        (folder / "root.pem").write_bytes(pair[0])
        options = [str(folder / "root.pem")]
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(((pair[1], pair[0]),)))
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with ExitStack() as stack:
            command = [sys.executable, "-m", "bench.stream", f"127.0.0.1:{port}", str(size), *options]
            for number in range(clients):
                log, env = folder / f"client{number}.log", environment(folder, PYTHONPATH=str(ROOT))
                stack.enter_context(running(command, log, env))
            if not served.done.wait(300):
                raise RuntimeError("the streams did not end within 300 s")
    finally:
        server.stop(0)
    return served.seconds[1:]


def main() -> None:
    """Run a client: receive a payload and send one, until the server ends the call."""
    address, size = sys.argv[1], int(sys.argv[2])
    if len(sys.argv) > 3:
        credentials = grpc.ssl_channel_credentials(Path(sys.argv[3]).read_bytes())
        channel = grpc.secure_channel(address, credentials)
    else:
        channel = grpc.insecure_channel(address)
    data = bytes(size)
    received = threading.Semaphore(0)

    def replies() -> Iterator[bytes]:
        while True:
            received.acquire()
            yield from chunks(data)

    left = size
    for chunk in channel.stream_stream(METHOD)(replies()):
        left -= len(chunk)
        if left == 0:
            left = size
            received.release()


if __name__ == "__main__":
    main()
