"""Half precision has the bits that NumPy gives it, for every pattern and every kind of number."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.wire.half import from_half, is_finite, to_half

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16 if array.dtype == np.float16 else np.uint32)


def test_every_half_widens_as_numpy_widens_it() -> None:
    assert np.array_equal(bits(from_half(EVERY)), bits(EVERY.astype(np.float32)))


def test_every_finite_half_and_what_lies_between_two_of_them_is_rounded_as_numpy_rounds_it() -> None:
    whole = EVERY[np.isfinite(EVERY)].astype(np.float32)
    ordered = np.sort(whole)
    ties = (ordered[:-1] + ordered[1:]) / 2  # exact in float32: to even, or nothing is equal
    near = np.concatenate([np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)])
    for values in (whole, ties, near):
        assert np.array_equal(bits(to_half(values)), bits(values.astype(np.float16)))


@given(st.lists(st.floats(width=32, min_value=-65504, max_value=65504), min_size=1, max_size=50))
def test_any_number_is_rounded_as_numpy_rounds_it(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    assert np.array_equal(bits(to_half(values)), bits(values.astype(np.float16)))


def test_shapes_stay_and_nothing_is_converted_in_place() -> None:
    values = np.linspace(-1e-4, 1e-4, 24, dtype=np.float32).reshape(2, 3, 4)
    before = values.copy()
    half = to_half(values.transpose(2, 0, 1))
    assert half.shape == (4, 2, 3)
    assert half.dtype == np.float16
    assert from_half(half).shape == (4, 2, 3)
    assert np.array_equal(values, before)
    assert to_half(np.zeros((0, 3), np.float32)).shape == (0, 3)
    assert to_half(np.array(0.5, np.float32)).shape == ()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_an_infinity_or_nan_is_seen(bad: float) -> None:
    array = np.array([[0.0, 65504.0], [6e-8, 1.0]], np.float16)
    assert is_finite(array)
    array[1, 0] = bad
    assert not is_finite(array)
