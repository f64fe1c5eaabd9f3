"""The piecewise weighted sum is numpy's own expression, number for number, whatever the shape or stride."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.methods import accumulate
from espalier.methods.accumulate import add_scaled


@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    piece=st.integers(1, 40),
    factor=st.floats(-3, 3, width=32),
    half=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 9),
)
def test_pieces_give_what_the_expression_gives(
    shape: list[int], piece: int, factor: float, half: bool, strided: bool, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    array: np.ndarray = draw.standard_normal(shape).astype(np.float16 if half else np.float32)
    whole: np.ndarray = draw.standard_normal([n + 2 for n in shape] if strided else shape).astype(np.float32)
    region: tuple[Any, ...] = (
        *(slice(0, n) for n in shape),
        ...,
    )  # the ellipsis makes a number an array, too
    total = whole[region]
    expected = whole.copy()
    expected[region] += np.float32(factor) * array
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accumulate, "PIECE", piece)
        add_scaled(total, factor, array)
    np.testing.assert_array_equal(whole, expected)


def test_a_sum_without_dimensions_is_added_to() -> None:
    total = np.array(1.0, np.float32)
    add_scaled(total, 2.0, np.array(3.0, np.float32))
    assert total == 7.0


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[2\] for a sum of shape \[3\]"):
        add_scaled(np.zeros(3), 1.0, np.zeros(2))
