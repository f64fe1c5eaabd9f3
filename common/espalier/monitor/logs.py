"""Log lines of a process: text for people, or one JSON object an event, Flower's own loggers included."""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from espalier.storage.json_file import jsonable

#: Tells the ServerApp, which Flower starts, in which form the cloud logs.
FORMAT_ENV = "ESPALIER_LOG_FORMAT"
_TEXT = "%(asctime)s %(name)s %(levelname)s %(message)s"
_PLAIN = frozenset(vars(logging.LogRecord("", 0, "", 0, "", None, None))) | {"message", "asctime", "taskName"}
_FLOWER_LINE = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL)\s*:\s*(.*)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_FORWARD_SECONDS = 0.5

_bound: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar("log fields", default={})  # noqa: B039
log = logging.getLogger("espalier")

if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler


@contextlib.contextmanager
def bind(**fields: Any) -> Iterator[None]:
    """Add fields (run, window, round, client, …) to every JSON line that this thread logs meanwhile."""
    token = _bound.set({**_bound.get(), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


class JsonFormatter(logging.Formatter):
    """One object a line: time (ISO 8601, UTC), level, logger, message, and what is known beside."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        extra = {key: value for key, value in vars(record).items() if key not in _PLAIN}
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": " ".join(record.getMessage().split()),
            **_bound.get(),
            **extra,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return json.dumps(jsonable(line), ensure_ascii=False)
        except TypeError:  # a field of a library's own type
            return json.dumps({key: str(value) for key, value in line.items()}, ensure_ascii=False)


class StderrHandler(_StreamHandler):
    """Writes to what stderr is at the moment: Flower puts a mirror in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        self.stream = sys.stderr
        super().emit(record)


def configure(form: str) -> None:
    """Set up logging to stderr.

    Parameters
    ----------
    form : str
        "text" or "json".
    """
    handler = StderrHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(_TEXT))
    root = logging.getLogger()
    for old in [known for known in root.handlers if isinstance(known, StderrHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
    flower = logging.getLogger("flwr")
    flower.propagate = form == "json"  # as text it prints by itself
    if form == "json":
        import flwr.app  # noqa: F401 - makes its handler at its import, which must come first

        flower.handlers.clear()
        flower.setLevel(logging.INFO)
        logging.captureWarnings(True)
    os.environ[FORMAT_ENV] = form


def is_json() -> bool:
    """Whether this process logs JSON."""
    return os.environ.get(FORMAT_ENV) == "json"


def announce(line: str) -> None:
    """Say on stdout that something is ready; where the process logs JSON, as an event."""
    if is_json():
        log.info("%s", line)
    else:
        print(line, flush=True)


def say_error(line: str) -> None:
    """Say on stderr why the process ends; where it logs JSON, as an event."""
    if is_json():
        log.error("%s", line)
    else:
        print(f"error: {line}", file=sys.stderr)


class Forwarder:
    """Turns the lines that a stock Flower process writes to a file into events of this one; a context manager.

    Parameters
    ----------
    path : Path
        The file; what is in it already is passed over.
    name : str
        Logger of lines that are no JSON.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._log = path, logging.getLogger(name)
        self._offset = path.stat().st_size if path.exists() else 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="forwarder", daemon=True)

    def __enter__(self) -> Forwarder:
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
        """Pass on one line: JSON as it is, another one with the level that it names."""
        text = _COLOUR.sub("", line).strip()
        if not text:
            return
        if text.startswith("{") and '"level"' in text:
            print(text, file=sys.stderr, flush=True)
            return
        level, message = match.groups() if (match := _FLOWER_LINE.fullmatch(text)) else ("INFO", text)
        if message.strip():
            self._log.log(logging.getLevelNamesMapping()[level], "%s", message.strip())
