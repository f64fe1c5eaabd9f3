"""The limit of what a link can do: the same bytes over a plain gRPC stream, down to each client and up again.

`python -m bench.stream HOST:PORT BYTES [ROOT_CERTIFICATES]` is a client; :func:`streamed` runs the server and clients.
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

from bench.rounds import ROOT, certificate
from bench.stock import environment, running

PIECE = 1 << 20
METHOD = "/bench.Stream/Exchange"


def pieces(data: bytes) -> Iterator[bytes]:
    """Yield the messages that `data` is sent in."""
    for start in range(0, len(data), PIECE):
        yield data[start : start + PIECE]


class _Rounds:
    """A server that begins each round when all clients are there, and times it."""

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
        """Send the data, take as many bytes back, and so on."""
        del context
        for _ in range(self._rounds):
            self._start.wait()
            yield from pieces(self._data)
            left = len(self._data)
            while left > 0:
                left -= len(next(requests))
            self._end.wait()


def streamed(folder: Path, clients: int, size: int, rounds: int, *, tls: bool) -> list[float]:
    """Time rounds: `size` bytes down to each client, then up again; seconds."""
    folder.mkdir(parents=True)
    served = _Rounds(clients, bytes(size), 1 + rounds)
    handler = grpc.method_handlers_generic_handler(
        "bench.Stream", {"Exchange": grpc.stream_stream_rpc_method_handler(served.exchange)}
    )
    server = grpc.server(ThreadPoolExecutor(2 * clients))
    server.add_generic_rpc_handlers((handler,))
    more = []
    if tls:
        pair = certificate()
        (folder / "root.pem").write_bytes(pair[0])
        more = [str(folder / "root.pem")]
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(((pair[1], pair[0]),)))
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with ExitStack() as stack:
            command = [sys.executable, "-m", "bench.stream", f"127.0.0.1:{port}", str(size), *more]
            for number in range(clients):
                log, env = folder / f"client{number}.log", environment(folder, PYTHONPATH=str(ROOT))
                stack.enter_context(running(command, log, env))
            if not served.done.wait(300):
                raise RuntimeError("the streams did not come to an end")
    finally:
        server.stop(0)
    return served.seconds[1:]


def main() -> None:
    """Be a client: take all, send as much, until the server ends the call."""
    address, size = sys.argv[1], int(sys.argv[2])
    if len(sys.argv) > 3:
        credentials = grpc.ssl_channel_credentials(Path(sys.argv[3]).read_bytes())
        channel = grpc.secure_channel(address, credentials)
    else:
        channel = grpc.insecure_channel(address)
    data = bytes(size)
    came = threading.Semaphore(0)

    def replies() -> Iterator[bytes]:
        while True:
            came.acquire()
            yield from pieces(data)

    left = size
    for piece in channel.stream_stream(METHOD)(replies()):
        left -= len(piece)
        if left == 0:
            left = size
            came.release()


if __name__ == "__main__":
    main()
