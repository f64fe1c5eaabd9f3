"""Polls are held until there is mail, let go when their caller is gone, and cost nothing to the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import grpc
import pytest

from espalier.config.timeouts import POLL_HELD, POLL_HELD_STOCK, PULL
from espalier.flower.upstreams import POLLER_HEADER
from espalier_edge.fleet.polling import ENDLESS, LongPolls, hold_time
from tests.support.processes import wait_until


class Call:
    """What a held poll asks of its gRPC call."""

    def __init__(self, poller: str = "a", remaining: float = PULL) -> None:
        self._poller, self._remaining = poller, remaining
        self._ended: list[Callable[[], None]] = []
        self._active = True

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ((POLLER_HEADER, self._poller),)

    def is_active(self) -> bool:
        return self._active

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self._ended.append(callback)
        return self._active

    def time_remaining(self) -> float:
        return self._remaining

    def hang_up(self) -> None:
        self._active = False
        for callback in self._ended:
            callback()


def wait(mail: LongPolls, node: int, call: Call) -> bool:
    return mail.wait(node, cast(grpc.ServicerContext, cast(Any, call)))


@pytest.mark.parametrize(
    ("remaining", "seconds"),
    [
        (None, POLL_HELD_STOCK),
        (2 * ENDLESS, POLL_HELD_STOCK),
        (PULL, POLL_HELD),
        (1000.0, POLL_HELD),
        (PULL - POLL_HELD + 2.0, 2.0),
        (1.0, 0.0),
    ],
)
def test_a_poll_is_held_as_long_as_its_caller_says(remaining: float | None, seconds: float) -> None:
    assert hold_time(remaining) == pytest.approx(seconds)


def test_mail_wakes_the_poll_of_its_node_alone() -> None:
    mail = LongPolls()
    with ThreadPoolExecutor() as pool:
        one, other = pool.submit(wait, mail, 1, Call()), pool.submit(wait, mail, 2, Call())
        wait_until(lambda: mail.held == 2, 5)
        mail.notify(1)
        assert one.result(5)
        assert not other.done()
        assert wait(mail, 1, Call())  # until somebody looks, there is mail
        mail.reset(1)
        mail.notify(2)
        assert other.result(5)
    assert mail.held == 0


def test_a_caller_that_disconnects_frees_its_thread() -> None:
    mail, call = LongPolls(), Call()
    with ThreadPoolExecutor() as pool:
        held = pool.submit(wait, mail, 1, call)
        wait_until(lambda: mail.held == 1, 5)
        call.hang_up()
        assert not held.result(5)
    mail.notify(1)
    assert not wait(mail, 1, call)
    assert wait(mail, 1, Call())


def test_the_later_of_two_polls_of_a_process_gets_the_mail() -> None:
    mail = LongPolls()
    with ThreadPoolExecutor() as pool:
        earlier = pool.submit(wait, mail, 1, Call())
        wait_until(lambda: mail.held == 1, 5)
        copy = pool.submit(wait, mail, 1, Call("b"))  # a copy of the device: another process
        wait_until(lambda: mail.held == 2, 5)
        later = pool.submit(wait, mail, 1, Call())
        assert not earlier.result(5)
        assert not copy.done()
        wait_until(lambda: mail.held == 2, 5)
        mail.notify(1)
        assert later.result(5)
        assert copy.result(5)


def test_polls_beyond_the_limit_are_answered_at_once() -> None:
    mail = LongPolls(most=1)
    first = Call()
    held = threading.Thread(target=wait, args=(mail, 1, first))
    held.start()
    wait_until(lambda: mail.held == 1, 5)
    began = time.monotonic()
    assert not wait(mail, 2, Call())
    assert time.monotonic() - began < POLL_HELD / 2
    mail.notify(2)
    assert wait(mail, 2, Call())
    first.hang_up()
    held.join(5)
    assert not held.is_alive()
