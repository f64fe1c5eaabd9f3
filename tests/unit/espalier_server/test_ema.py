"""The moving average of the global model."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier_server.ema import ema_update


@settings(deadline=None)
@given(decay=st.floats(0, 0.999), old=st.floats(-5, 5), new=st.floats(-5, 5))
def test_the_average_lies_between_old_and_new(decay: float, old: float, new: float) -> None:
    a, b = np.full((2, 3), old, np.float32), np.full((2, 3), new, np.float32)
    moved = ema_update({"w": a}, {"w": b}, decay)["w"]
    assert moved.dtype == np.float32
    assert np.allclose(moved, decay * old + (1 - decay) * new, atol=1e-5)
    assert (a == np.float32(old)).all()


def test_the_average_starts_anew_when_the_model_changes_shape() -> None:
    new = {"w": np.ones(3, np.float32), "n": np.array(7)}
    for former in ({}, {"w": np.zeros(4, np.float32), "n": np.array(0)}):
        moved = ema_update(former, new, 0.9)
        assert moved["w"].tolist() == [1, 1, 1]
        assert moved["w"] is not new["w"]
    assert ema_update({"w": np.zeros(3, np.float32), "n": np.array(0)}, new, 0.9)["n"] == 7
