"""`espalier top`: shows the status of the tree live in a terminal, until q or Ctrl-C."""

from __future__ import annotations

import contextlib
import queue
import select
import sys
import termios
import threading
import tty
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live

from espalier.errors import AddressError, EspalierError
from espalier.security.transport import Security
from espalier_proto import monitor_pb2 as mpb
from espalier_server.commands.status_client import watch
from espalier_server.commands.status_text import render

#: Seconds between attempts to connect.
RECONNECT_SECONDS = 2.0
_TICK_SECONDS = 0.1
_HELP = "q to leave"


def run_top(address: str, security: Security, interval: float, *, server_name: str = "") -> None:
    """Show the status of the tree until q is pressed; reconnect if the connection is lost.

    Parameters
    ----------
    address : str
        HOST:PORT of the monitoring service.
    security : Security
        How to connect to it.
    interval : float
        Seconds between updates.
    server_name : str
        Name in the server's certificate, if it is not the address.

    Raises
    ------
    EspalierError
        There is no terminal, or the first connection fails.
    """
    console = Console()
    if not console.is_terminal or not sys.stdin.isatty():
        raise EspalierError("`espalier top` needs a terminal; use `espalier status` elsewhere")
    feed = Feed(address, security, interval, server_name)
    newest = feed.first()
    with (
        keys() as pressed,
        Live(render(newest, _HELP), console=console, screen=True, auto_refresh=False) as live,
    ):
        while pressed(_TICK_SECONDS) not in ("q", "Q"):
            if (found := feed.newest()) is not None:
                newest = found
                live.update(render(newest, feed.trouble or _HELP), refresh=True)


class Feed:
    """Receives status snapshots in a background thread; `trouble` holds the last error, "" while connected."""

    def __init__(self, address: str, security: Security, interval: float, server_name: str) -> None:
        self._queue: queue.Queue[mpb.TreeStatus | EspalierError] = queue.Queue()
        self._arguments = (address, security, interval, server_name)
        self._last: mpb.TreeStatus | None = None
        self.trouble = ""
        threading.Thread(target=self._run, name="feed", daemon=True).start()

    def first(self) -> mpb.TreeStatus:
        """Wait for the first snapshot.

        Raises
        ------
        EspalierError
            The first connection failed.
        """
        found = self._queue.get()
        if isinstance(found, EspalierError):
            raise found
        self._last = found
        return found

    def newest(self) -> mpb.TreeStatus | None:
        """Return the newest snapshot if it or `trouble` has changed since the last call, else None."""
        changed = False
        with contextlib.suppress(queue.Empty):
            while True:
                found = self._queue.get_nowait()
                changed = True
                if isinstance(found, EspalierError):
                    self.trouble = f"{found}; reconnecting"
                else:
                    self._last, self.trouble = found, ""
        return self._last if changed else None

    def _run(self) -> None:
        address, security, interval, server_name = self._arguments
        pause = threading.Event()
        while True:
            try:
                for status in watch(address, security, interval, server_name=server_name):
                    self._queue.put(status)
                self._queue.put(AddressError(f"{address} closed the connection"))
            except EspalierError as error:
                self._queue.put(error)
            pause.wait(RECONNECT_SECONDS)


class Keys:
    """Reads single key presses from the terminal."""

    def __call__(self, timeout: float) -> str:
        """Return the next key press, or "" if there is none within `timeout` seconds."""
        ready, _, _ = select.select([sys.stdin], [], [], timeout)
        return sys.stdin.read(1) if ready else ""


@contextlib.contextmanager
def keys() -> Iterator[Keys]:
    """Read keys without line buffering and echo within the context."""
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield Keys()
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
