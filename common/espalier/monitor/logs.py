"""Log lines of a process, those of Flower's loggers included: text, or one JSON object per event."""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from espalier.storage.json_file import jsonable

#: Environment variable with the cloud's log format, for the ServerApp that Flower starts.
FORMAT_ENV = "ESPALIER_LOG_FORMAT"
_TEXT = "%(asctime)s %(name)s %(levelname)s %(message)s"
_PLAIN = frozenset(vars(logging.LogRecord("", 0, "", 0, "", None, None))) | {"message", "asctime", "taskName"}

_bound: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar("log fields", default={})  # noqa: B039
log = logging.getLogger("espalier")

if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler


@contextlib.contextmanager
def bind(**fields: Any) -> Iterator[None]:
    """Add fields (run, window, round, client, …) to every JSON line that this thread logs in the block."""
    token = _bound.set({**_bound.get(), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


class JsonFormatter(logging.Formatter):
    """One object per line: time (ISO 8601, UTC), level, logger, message, the bound fields and the record's own."""

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
    """Writes to the current ``sys.stderr``, which Flower replaces."""

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
    flower.propagate = form == "json"  # Flower prints text itself
    if form == "json":
        import flwr.app  # noqa: F401 - its import adds the handler that is removed below

        flower.handlers.clear()
        flower.setLevel(logging.INFO)
        logging.captureWarnings(True)
    os.environ[FORMAT_ENV] = form


def is_json() -> bool:
    """Whether this process logs JSON."""
    return os.environ.get(FORMAT_ENV) == "json"


def announce(line: str) -> None:
    """Print to stdout that something is ready; with JSON logs, log it as an event."""
    if is_json():
        log.info("%s", line)
    else:
        print(line, flush=True)


def say_error(line: str) -> None:
    """Print to stderr why the process ends; with JSON logs, log it as an event."""
    if is_json():
        log.error("%s", line)
    else:
        print(f"error: {line}", file=sys.stderr)
