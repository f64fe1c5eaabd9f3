"""A small state for the tests of what is stored: its tensors and the value they were made of."""

from __future__ import annotations

import numpy as np


def tensors(value: float) -> dict[str, np.ndarray]:
    """Return an optimiser's state that holds a value."""
    return {
        "adam.step": np.array(int(value), dtype=np.int64),
        "adam.m": np.full((2, 3), value, dtype=np.float32),
    }


def value_of(state: dict[str, np.ndarray]) -> float:
    """Return the value of `tensors`, 0 for an empty state."""
    return float(state["adam.m"][0, 0]) if state else 0.0
