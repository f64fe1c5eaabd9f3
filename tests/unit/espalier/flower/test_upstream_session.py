"""A node's session with one upstream server."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import cast

from espalier.flower.backoff import PollPace
from espalier.flower.upstream_session import BUSY_POLL_INTERVAL, SharedNodeState, UpstreamSession


class _Busy(UpstreamSession):
    """A session without a server, in the middle of a call of the app."""

    def __init__(self) -> None:
        self.shared = cast(
            SharedNodeState,
            SimpleNamespace(
                stopped=threading.Event(), app_lock=threading.Lock(), app_lock_released=threading.Condition()
            ),
        )
        self._busy = True


def test_a_node_polls_less_during_a_call() -> None:
    loop, pace = _Busy(), PollPace(fast=0.001, slow=60.0)
    began = time.monotonic()
    loop._rest(pace, 0.0)
    assert time.monotonic() - began >= BUSY_POLL_INTERVAL
    cold = PollPace(fast=0.001, slow=60.0)
    cold._active_at -= 600.0
    assert cold.after(0.0) > 50.0
    resting = threading.Thread(target=loop._rest, args=(cold, 0.0))
    resting.start()
    with loop.shared.app_lock_released:
        loop._busy = False
        loop.shared.app_lock_released.notify_all()
    resting.join(10)
    assert not resting.is_alive()
    # Its pace begins anew: not at the minute that it had come to.
    assert cold.after(0.0) < 1.0
    # A server that holds polls is asked again at once.
    loop._busy = True
    began = time.monotonic()
    loop._rest(pace, 1.0)
    assert time.monotonic() - began < BUSY_POLL_INTERVAL
