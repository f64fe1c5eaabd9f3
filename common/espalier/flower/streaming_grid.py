"""The interface of the grids of edge and cloud: Flower's Grid, and an exchange that yields replies as they arrive."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator

from flwr.app import Error, Message
from flwr.app.constants import DEFAULT_TTL
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.date import now

from espalier.config.timeouts import TTL_MARGIN
from espalier.flower.memory import CycleCollector


class StreamingGrid(Grid):
    """A Flower Grid that yields replies as they arrive and deletes what it abandons.

    Attributes
    ----------
    abandoned : int
        Number of messages whose reply was abandoned.
    late : int
        Number of replies to abandoned messages; their payload is not transferred.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.abandoned = 0
        self.late = 0

    @abstractmethod
    def exchange(
        self,
        messages: Iterable[Message],
        *,
        deadline: float,
        quorum: int | None = None,
        grace: float = 0.0,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[Message]:
        """Send messages and yield the replies as they arrive.

        Parameters
        ----------
        messages : iterable of Message
            An ArrayRecord or RecordDict shared by several of them is serialised and stored once.
        deadline : float
            Seconds after which outstanding messages are abandoned.
        quorum : int, optional
            Number of replies with content that starts the `grace` period; by default the exchange waits for all.
        grace : float
            Seconds to wait for the other replies once the quorum is reached.
        cancelled : callable, optional
            Called about twice a second or more often; once it returns True, outstanding messages are abandoned.

        Yields
        ------
        Message
            A reply, or an Error: of the node's app, NODE_UNAVAILABLE for a node that is offline, or
            REPLY_MESSAGE_UNAVAILABLE for a reply whose upload ended early or whose objects are malformed.

        Notes
        -----
        However the exchange ends (all replies, deadline, quorum, cancelled, generator closed), what it sent and
        received is deleted. Late replies are refused and counted.
        """

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and return the replies that arrive within `timeout` seconds."""
        return list(self.exchange(messages, deadline=DEFAULT_TTL if timeout is None else timeout))


class Countdown:
    """The end of an exchange: its deadline, or the end of the grace period after the quorum.

    Parameters
    ----------
    deadline, grace : float
        Seconds, see :meth:`StreamingGrid.exchange`.
    quorum : int, optional
        Number of replies with content that starts the grace period.
    """

    def __init__(self, deadline: float, quorum: int | None, grace: float) -> None:
        self._end = time.monotonic() + deadline
        self._quorum, self._grace = quorum, grace
        self._replies = 0
        self._collector = CycleCollector()

    @property
    def left(self) -> float:
        """Seconds until the end; negative afterwards."""
        return self._end - time.monotonic()

    def count(self, reply: Message) -> None:
        """Count a reply that is about to be yielded, and free the payloads of those yielded before it."""
        self._replies += reply.has_content()
        if self._quorum is not None and self._replies == self._quorum:
            self._end = min(self._end, time.monotonic() + self._grace)
        self._collector.collect(but_last=True)
        self._collector.track(reply)


def set_ttl(message: Message, deadline: float) -> None:
    """Have a message expire a margin after the deadline of its exchange."""
    message.metadata.ttl = now().timestamp() + deadline + TTL_MARGIN - message.metadata.created_at


def set_origin(reply: Message, sent: Message, run_id: int) -> Message:
    """Replace the origin that a reply's objects state by the one that its announcement was checked for; return it."""
    metadata = reply.metadata.__dict__
    metadata["_src_node_id"], metadata["_dst_node_id"] = sent.metadata.dst_node_id, SUPERLINK_NODE_ID
    metadata["_run_id"], metadata["_reply_to_message_id"] = run_id, sent.metadata.message_id
    return reply


def error_reply(sent: Message, code: int, reason: str) -> Message:
    """Return an Error in place of the reply to a message."""
    return Message(Error(code, reason), reply_to=sent)
