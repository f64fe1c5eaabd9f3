"""`espalier top`: the live tree in a terminal, until q or Ctrl-C."""

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

AGAIN_SECONDS = 2.0
_TICK = 0.1
LEAVE = "q to leave"


def run_top(address: str, security: Security, interval: float, *, server_name: str = "") -> None:
    """Show the tree until somebody leaves; a server that goes away is waited for.

    Raises
    ------
    EspalierError
        The first connection does not come about.
    """
    console = Console()
    if not console.is_terminal or not sys.stdin.isatty():
        raise EspalierError("`espalier top` needs a terminal; use `espalier status` elsewhere")
    feed = Feed(address, security, interval, server_name)
    newest = feed.first()
    with (
        keys() as pressed,
        Live(render(newest, LEAVE), console=console, screen=True, auto_refresh=False) as live,
    ):
        while pressed(_TICK) not in ("q", "Q"):
            if (found := feed.newest()) is not None:
                newest = found
                live.update(render(newest, feed.trouble or LEAVE), refresh=True)


class Feed:
    """Snapshots that another thread takes from a server, again and again; `trouble` says why none come."""

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
            There is none.
        """
        found = self._queue.get()
        if isinstance(found, EspalierError):
            raise found
        self._last = found
        return found

    def newest(self) -> mpb.TreeStatus | None:
        """Return the snapshot to show if anything is new, else None."""
        changed = False
        with contextlib.suppress(queue.Empty):
            while True:
                found = self._queue.get_nowait()
                changed = True
                if isinstance(found, EspalierError):
                    self.trouble = f"{found}; trying again"
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
                self._queue.put(AddressError(f"{address} has ended the view"))
            except EspalierError as error:
                self._queue.put(error)
            pause.wait(AGAIN_SECONDS)


class Keys:
    """Reads single keys of a terminal."""

    def __call__(self, timeout: float) -> str:
        """Return a key that was pressed within `timeout` seconds, or ""."""
        ready, _, _ = select.select([sys.stdin], [], [], timeout)
        return sys.stdin.read(1) if ready else ""


@contextlib.contextmanager
def keys() -> Iterator[Keys]:
    """Take keys one by one and unseen while the context lasts."""
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield Keys()
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
