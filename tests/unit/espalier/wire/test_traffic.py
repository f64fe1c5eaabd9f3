"""The count of bytes and messages of each link."""

from __future__ import annotations

import threading

import pytest

from espalier.wire.traffic import CLIENT_EDGE, EDGE_CLOUD, Ledger


def test_traffic_adds_up() -> None:
    ledger, other = Ledger(), Ledger()
    ledger.add(CLIENT_EDGE, up_bytes=3)
    other.add(CLIENT_EDGE, up_bytes=4, down_bytes=5, messages=2)
    other.add(EDGE_CLOUD, down_bytes=1)
    ledger.merge(other)
    ledger.merge({"edge-cloud": {"up_bytes": 10, "down_bytes": 0, "messages": 0}})
    assert ledger.as_dict() == {
        "client-edge": {"up_bytes": 7, "down_bytes": 5, "messages": 3},
        "edge-cloud": {"up_bytes": 10, "down_bytes": 1, "messages": 1},
    }
    with pytest.raises(ValueError, match="negative"):
        ledger.add(CLIENT_EDGE, up_bytes=-1)


def test_ledger_counts_every_thread() -> None:
    ledger = Ledger()

    def add() -> None:
        for _ in range(1000):
            ledger.add(CLIENT_EDGE, up_bytes=1)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.as_dict()["client-edge"] == {"up_bytes": 4000, "down_bytes": 0, "messages": 4000}
