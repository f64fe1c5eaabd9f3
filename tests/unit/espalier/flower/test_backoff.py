"""Waiting times between attempts and between polls."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from espalier.flower.backoff import Backoff, PollPace


def test_backoff_grows_with_jitter_to_its_cap_and_starts_again() -> None:
    backoff = Backoff(first=0.2, cap=10.0, generator=random.Random(0))
    waits = [backoff.next() for _ in range(12)]
    for tries, wait in enumerate(waits):
        span = min(10.0, 0.3 * 2**tries)
        assert span / 2 <= wait <= span
    assert len(set(waits[-4:])) == 4
    backoff.reset()
    assert backoff.next() <= 0.3


def test_the_pace_of_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [50.0]
    monkeypatch.setattr("espalier.flower.backoff.time", SimpleNamespace(monotonic=lambda: clock[0]))
    pace = PollPace(fast=0.01, slow=1.0, share=0.1)
    assert pace.after(took=1.0) == 0.0  # it was held
    waits = []
    for idle in (0.0, 0.05, 0.5, 3.0, 60.0):
        clock[0] = 50.0 + idle
        waits.append(round(pace.after(took=0.002), 6))
    assert waits == [0.01, 0.01, 0.05, 0.3, 1.0]
    pace.activity()
    assert pace.after(took=0.002) == 0.01
