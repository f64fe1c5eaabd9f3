"""Calls of the Fleet API by a node."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from espalier.flower import fleet_client
from espalier.flower.fleet_client import FleetClient
from espalier.flower.upstreams import Upstream


def test_pending_objects_are_waited_for_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rests: list[float] = []
    there: set[str] = set()

    class Stopped(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            rests.append(timeout or 0.0)
            there.update(objects)  # all come while the first one is waited for
            return False

    objects = [f"{n}" for n in range(6)]
    key = ec.generate_private_key(ec.SECP256R1())
    client = FleetClient(Upstream("127.0.0.1:1", insecure=True), key, Stopped())
    # The server answers a call when it is made, not when the answer is looked at.
    begin = lambda method, object_id: SimpleNamespace(object_available=object_id in there)  # noqa: E731
    monkeypatch.setattr(client, "_channel", SimpleNamespace(begin=begin, close=lambda: None))
    monkeypatch.setattr(fleet_client, "call_result", lambda call: call)
    got: list[str] = []

    def took(object_id: str, answer: Any) -> bool:
        if answer.object_available:
            got.append(object_id)
        return bool(answer.object_available)

    client._call_for_each("PullObject", objects, lambda object_id: object_id, took, time.time() + 60)
    assert sorted(got) == objects
    assert len(rests) == 1
    assert rests[0] < 0.02
