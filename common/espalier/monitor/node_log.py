"""Log lines for the events of a resident node: what happened, and the remedy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

_LINES: dict[str, tuple[int, str]] = {
    "connected": (logging.INFO, "connected to {upstream}"),
    "disconnected": (logging.WARNING, "lost {upstream} ({reason}); trying again"),
    "unreachable": (
        logging.WARNING,
        "{upstream} does not answer ({reason}); trying again; is it running, and is the address right?",
    ),
    "untrusted": (logging.WARNING, "no secure connection to {upstream}: {reason}; trying again"),
    "refused": (logging.WARNING, "{upstream} refuses this node ({reason}); trying again"),
    "key refused": (
        logging.WARNING,
        "{upstream} refuses this node: {reason}; trying again; to admit it, there: {admit}",
    ),
    "dropped": (logging.INFO, "dropped a {message_type!r} message of {upstream}: {reason}"),
    "error": (logging.WARNING, "a {message_type!r} message of {upstream} failed: {reason}"),
    "message": (logging.DEBUG, "a {message_type!r} message of {upstream}"),
    "reply": (logging.DEBUG, "answered a {message_type!r} message of {upstream} after {seconds:.2f} s"),
}


def event_logger(
    log: logging.Logger, admit: str = "register its public key"
) -> Callable[[str, Mapping[str, Any]], None]:
    """Return an `on_event` for a ResidentNode that writes to `log`.

    Parameters
    ----------
    log : logging.Logger
        The logger.
    admit : str
        The command that admits this node at a server that admits registered keys only.
    """

    def on_event(kind: str, facts: Mapping[str, Any]) -> None:
        if facts.get("untrusted"):
            kind = "untrusted"
        elif facts.get("by_key"):
            kind = "key refused"
        level, line = _LINES.get(kind, (logging.INFO, kind + " at {upstream}"))
        fields = {
            key: facts[key] for key in ("upstream", "message_type", "reason", "seconds") if key in facts
        }
        log.log(level, "%s", line.format(admit=admit, **facts), extra={"event": kind, **fields})

    return on_event
