"""All time limits of the tree in one table, and the order they must have so that faults can be distinguished."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

# --- a node and its server --------------------------------------------------------------------------
#: Seconds a heartbeat may take.
HEARTBEAT_CALL = 5.0
#: Seconds between two heartbeats.
HEARTBEAT = 9.0
#: Seconds after a heartbeat during which Flower considers a node online: twice its shortest interval.
LEASE = 20.0
#: Seconds a call without a payload may take.
CALL = 20.0
#: Seconds after its lease within which a node may return before its messages are abandoned.
OFFLINE_GRACE = 3.0
#: Seconds without an acknowledged heartbeat after which a pending call is cancelled.
SILENCE = 25.0
#: Seconds an edge holds a poll while there is no message, with and without a deadline of the caller.
POLL_HELD = 25.0
POLL_HELD_STOCK = 1.0
#: Seconds a poll may take.
PULL = 30.0
#: Seconds without progress after which an upload is aborted: at an edge, at the cloud (Flower's limit is 180).
UPLOAD_STALL = 30.0
CLOUD_UPLOAD_STALL = 190.0

# --- hello ----------------------------------------------------------------------------------------
#: Seconds an edge has to answer a hello that it answered before: it only says who is there now.
RETURN_HELLO = 5.0
#: Seconds clients have to answer a hello; their edge's answer waits for them.
CLIENT_HELLO = 20.0
#: Seconds edges have to answer a first hello.
EDGE_HELLO = 45.0
#: Seconds a client has to receive the reason of its refusal.
CLIENT_REFUSAL = 5.0
#: Seconds an edge has to forward such a reason.
EDGE_REFUSAL = 10.0

# --- a window -------------------------------------------------------------------------------------
#: Seconds between two looks at who is connected while a window runs; between two questions how far the edges are, where
#: none of them was started again; and that an answer may take.
WATCH = 2.0
PROGRESS = 6.0
WATCH_CALL = 5.0
#: Smallest adaptive round deadline in seconds.
LEAST_ROUND = 10.0
#: Seconds an inquiry may take beyond what the edges wait for their clients.
INQUIRY_MARGIN = 30.0
#: Seconds a window may take beyond its rounds: hellos, uploads, the edges' own work.
WINDOW_MARGIN = 60.0
#: Seconds between the deadline of a reply and the end of its message's ttl, so that late replies are counted and freed.
TTL_MARGIN = 60.0
#: Seconds subtracted from a plain message's ttl so that the reply arrives in time.
REPLY_MARGIN = 10.0

# --- processes ------------------------------------------------------------------------------------
#: Seconds that a stopping node waits for a pending call.
STOP_CALL = 3.0
#: Seconds after which a stopping node exits unconditionally.
STOP = 8.0
#: Seconds after which a child process that was asked to stop is killed.
KILL = 10.0


@dataclass(frozen=True)
class Limit:
    """One row of the table: a limit, its seconds and what it is for."""

    name: str
    seconds: float
    meaning: str


def window_seconds(rounds: int, round_deadline: float, window_deadline: float) -> float:
    """Return how long the cloud waits for a window: what was set, or its rounds' deadlines and a margin."""
    return window_deadline or rounds * round_deadline + WINDOW_MARGIN


def chains(round_deadline: float, window_deadline: float, rg: int) -> list[list[Limit]]:
    """Return the limits in the orders that they must keep, each chain ascending.

    Parameters
    ----------
    round_deadline, window_deadline : float
        The run's settings, in seconds; a window deadline of 0 follows from the rounds.
    rg : int
        Rounds of a window.
    """
    window = window_seconds(rg, round_deadline, window_deadline)
    return [
        [
            Limit("heartbeat call", HEARTBEAT_CALL, "one heartbeat"),
            Limit("heartbeat", HEARTBEAT, "between two heartbeats"),
            Limit("lease", LEASE, "without a heartbeat: offline"),
            Limit("offline", LEASE + OFFLINE_GRACE, "what it was to do is given up"),
            Limit("silence", SILENCE, "a node hangs up and connects anew"),
            Limit("poll", PULL, "one poll for a message"),
        ],
        [
            Limit("held poll", POLL_HELD, "an edge holds a poll until there is a message"),
            Limit("poll", PULL, "one poll for a message"),
        ],
        [
            Limit("return hello", RETURN_HELLO, "an edge that is known says who is there"),
            Limit("client hello", CLIENT_HELLO, "a client introduces itself"),
            Limit("edge hello", EDGE_HELLO, "an edge introduces itself and its clients"),
        ],
        [
            Limit("round-deadline", round_deadline, "an edge waits for its clients"),
            Limit("window-deadline", window, "the cloud waits for its edges"),
            Limit("message ttl", window + TTL_MARGIN, "Flower forgets a message"),
        ],
        [
            Limit("stop of a call", STOP_CALL, "a node that stops waits for its app"),
            Limit("stop", STOP, "a node that was told to stop ends in any case"),
            Limit("kill", KILL, "whoever started it kills it"),
        ],
    ]


def order_faults(table: Iterable[Iterable[Limit]]) -> list[str]:
    """Return a line for each limit that is not below the next one of its chain."""
    faults = []
    for chain in table:
        for lower, upper in itertools.pairwise(chain):
            if not lower.seconds < upper.seconds:
                faults.append(
                    f"{lower.name}: {lower.seconds:g} s ({lower.meaning}) must be less than {upper.name}, "
                    f"{upper.seconds:g} s ({upper.meaning})"
                )
    return faults
