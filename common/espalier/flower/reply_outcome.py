"""What a reply means for the run: taken, an error of the node's app, or a node that was lost."""

from __future__ import annotations

from flwr.app import Message
from flwr.common.constant import ErrorCode


def fault_kind(reply: Message) -> str:
    """Return how a reply that was not taken is counted.

    Returns
    -------
    str
        "lost" where the node went away, "error" where its app failed, "refused" where its content is unsound.
    """
    if not reply.has_error():
        return "refused"
    return "lost" if reply.error.code == ErrorCode.NODE_UNAVAILABLE else "error"
