"""Counters of the payload bytes and messages per kind of link."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

CLIENT_EDGE = "client-edge"
EDGE_CLOUD = "edge-cloud"
LINKS = (CLIENT_EDGE, EDGE_CLOUD)


@dataclass
class Traffic:
    """Payload bytes and messages of one kind of link; `up` is towards the cloud."""

    up_bytes: int = 0
    down_bytes: int = 0
    messages: int = 0


class Ledger:
    """Totals per kind of link; thread-safe."""

    def __init__(self) -> None:
        self._links = {link: Traffic() for link in LINKS}
        self._lock = threading.Lock()

    def add(self, link: str, *, up_bytes: int = 0, down_bytes: int = 0, messages: int = 1) -> None:
        """Add bytes and messages to a link, one of `LINKS`; raises ValueError for a negative number."""
        if min(up_bytes, down_bytes, messages) < 0:
            raise ValueError(
                f"negative traffic on {link}: {up_bytes} up, {down_bytes} down, {messages} messages"
            )
        with self._lock:
            traffic = self._links[link]
            traffic.up_bytes += up_bytes
            traffic.down_bytes += down_bytes
            traffic.messages += messages

    def merge(self, other: Ledger | Mapping[str, Mapping[str, int]]) -> None:
        """Add the totals of another ledger, or of a result of `as_dict`."""
        for link, counts in (other.as_dict() if isinstance(other, Ledger) else other).items():
            self.add(link, **counts)

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Return ``{link: {"up_bytes", "down_bytes", "messages"}}`` for every link."""
        with self._lock:
            return {link: dict(vars(traffic)) for link, traffic in self._links.items()}
