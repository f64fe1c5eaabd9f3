"""Forwards the log of a stock Flower process, the SuperLink, as events of the cloud."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
from pathlib import Path

_FLOWER_LINE = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL)\s*:\s*(.*)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_FORWARD_SECONDS = 0.5


class LogForwarder:
    """Logs the lines that a stock Flower process appends to a file as events of this process; a context manager.

    Parameters
    ----------
    path : Path
        The file; its present content is not forwarded.
    name : str
        Logger of lines that are not JSON.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._log = path, logging.getLogger(name)
        self._offset = path.stat().st_size if path.exists() else 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="forwarder", daemon=True)

    def __enter__(self) -> LogForwarder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        ending = False
        while not ending:
            ending = self._ended.wait(_FORWARD_SECONDS)
            with contextlib.suppress(OSError), self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
                complete = data[: data.rfind(b"\n") + 1]
                self._offset += len(complete)
                for line in complete.decode("utf-8", "replace").splitlines():
                    self.forward(line)

    def forward(self, line: str) -> None:
        """Forward one line: JSON unchanged, any other with the level that it names."""
        text = _COLOUR.sub("", line).strip()
        if not text:
            return
        if text.startswith("{") and '"level"' in text:
            print(text, file=sys.stderr, flush=True)
            return
        level, message = match.groups() if (match := _FLOWER_LINE.fullmatch(text)) else ("INFO", text)
        if message.strip():
            self._log.log(logging.getLevelNamesMapping()[level], "%s", message.strip())
