"""Half precision has the bits that NumPy gives it, for every pattern and every kind of number."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.wire.half import PIECE, from_half, is_finite, to_half

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16 if array.dtype == np.float16 else np.uint32)


def test_every_half_widens_as_numpy_widens_it() -> None:
    assert np.array_equal(bits(from_half(EVERY)), bits(EVERY.astype(np.float32)))


def test_halves_and_midpoints_round_as_in_numpy() -> None:
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


def test_pieces_meet_without_a_seam() -> None:
    """The last piece is short, one holds an infinity, and that one alone goes another way."""
    values = np.random.default_rng(0).standard_normal(2 * PIECE + 3).astype(np.float32)
    values[: PIECE // 2] *= np.float32(1e-6)
    values[-1], values[PIECE + 5] = 6e-8, -np.inf
    half = to_half(values)
    assert np.array_equal(bits(half), bits(values.astype(np.float16)))
    assert np.array_equal(bits(from_half(half)), bits(half.astype(np.float32)))
    assert not is_finite(half)
    half[PIECE + 5] = 0
    assert is_finite(half)


def test_what_is_too_large_becomes_an_infinity_or_is_clipped() -> None:
    values = np.array([65519.99, 65520, -65520, 1e9, -3e38, 65504, 1.5], np.float32)
    with np.errstate(over="ignore"):
        assert np.array_equal(bits(to_half(values)), bits(values.astype(np.float16)))
    assert to_half(values, clip=True).tolist() == [65504, 65504, -65504, 65504, -65504, 65504, 1.5]
    assert np.isnan(to_half(np.array([np.nan, 1.0], np.float32), clip=True)).tolist() == [True, False]


def test_the_result_goes_where_it_is_wanted_or_nowhere() -> None:
    values, room = np.linspace(-2, 2, 6, dtype=np.float32).reshape(2, 3), np.zeros((4, 3), np.float16)
    assert to_half(values.T.copy().T, room[1:3]).base is room
    assert np.array_equal(room, np.vstack([np.zeros(3), values, np.zeros(3)]).astype(np.float16))
    wide = np.zeros((2, 3), np.float32)
    assert from_half(room[1:3], wide) is wide
    assert np.array_equal(wide, room[1:3])
    for bad in (room.T, room[::2], np.zeros((2, 3), np.float32)):
        with pytest.raises(ValueError, match="not a C-contiguous float16"):
            to_half(values, bad)
    for bad in (np.zeros((3, 2), np.float32), np.zeros((4, 3), np.float32)[::2], room[1:3]):
        with pytest.raises(ValueError, match="not a C-contiguous float32"):
            from_half(room[1:3], bad)
