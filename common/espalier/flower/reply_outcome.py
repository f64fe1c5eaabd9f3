"""Classifies a reply that was not accepted: an error of the app, a lost node, or invalid content."""

from __future__ import annotations

from flwr.app import Message
from flwr.common.constant import ErrorCode


def fault_kind(reply: Message) -> str:
    """Return the class in which a reply that was not accepted is counted.

    Returns
    -------
    str
        "lost" if the node went offline, "error" if its app failed, "refused" if the content is invalid.
    """
    if not reply.has_error():
        return "refused"
    return "lost" if reply.error.code == ErrorCode.NODE_UNAVAILABLE else "error"
