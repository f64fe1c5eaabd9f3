"""A small TCP proxy for a link between two tiers that can be slow, lossy, cut or partitioned."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
from collections.abc import Coroutine
from typing import Any, Literal

Mode = Literal["open", "slow", "lossy", "cut", "partition"]

CHUNK = 1 << 16
#: Connections of a proxy; more are a loop or a leak, which shall not take the other proxies' file descriptors.
MOST = 200


class Proxy:
    """Forwards connections to an address; every proxy has its own port and event loop.

    Modes
    -----
    open : forward.
    slow : hold every piece back by `delay` seconds.
    lossy : lose a piece now and then; as TCP loses nothing, that resets the connection.
    cut : reset every connection, and every new one.
    partition : forward nothing and close nothing, as an unplugged cable; pending data is lost with its connection.

    Parameters
    ----------
    target : str
        HOST:PORT to forward to; the server may start later.
    seed : int
        Seed of the losses.
    """

    def __init__(self, target: str, seed: int = 0) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._random = random.Random(seed)
        self.mode: Mode = "open"
        self.delay = 0.2
        self.loss = 0.05
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self.port = 0
        self._thread = threading.Thread(target=self._run, name=f"proxy to {target}", daemon=True)
        self._thread.start()
        self._ready.wait(10)

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    def set(self, mode: Mode) -> None:
        """Change the link."""
        self.mode = mode
        if mode in ("cut", "open"):
            # Connections cannot continue after a partition, as the data lost in it is unknown.
            self._call(self._reset())

    def close(self) -> None:
        """Stop listening and end every connection."""
        self._call(self._reset())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(5)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)

        async def listen() -> asyncio.Server:
            server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            self._ready.set()
            return server

        server = self._loop.run_until_complete(listen())
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _reset(self) -> None:
        for writer in list(self._writers):
            _abort(writer)
        self._writers.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while self.mode == "partition":
                await asyncio.sleep(0.05)
            if self.mode == "cut" or len(self._writers) > MOST:
                return
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            self._writers.add(far_writer)
            # A port of the kernel's choice that nobody listens at may be the very one the connection is made from.
            try:
                if far_writer.get_extra_info("sockname") == far_writer.get_extra_info("peername"):
                    raise ConnectionRefusedError
                await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
            finally:
                self._writers.discard(far_writer)
                _abort(far_writer)
        except (OSError, asyncio.IncompleteReadError):
            return
        finally:
            self._writers.discard(writer)
            _abort(writer)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(CHUNK):
            if self.mode == "slow":
                await asyncio.sleep(self.delay)
            while self.mode == "partition":
                await asyncio.sleep(0.05)
            if self.mode == "cut" or (self.mode == "lossy" and self._random.random() < self.loss):
                raise ConnectionResetError
            writer.write(piece)
            await writer.drain()
        raise ConnectionResetError  # one side is done: end both, as these links are never half open


def _abort(writer: asyncio.StreamWriter) -> None:
    """Reset a connection instead of closing it in good order."""
    with contextlib.suppress(OSError):
        raw = writer.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    writer.transport.abort()
