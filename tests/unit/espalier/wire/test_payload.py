from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from espalier.errors import WireError
from espalier.wire.payload import LARGEST, Layout, TensorSpec, Weights, fault_of
from espalier_proto import espalier_pb2 as pb

ARRAYS = st.dictionaries(
    st.text("abc.", min_size=1, max_size=6),
    st.sampled_from(["float32", "float64", "int64", "uint8"]).flatmap(
        lambda d: hnp.arrays(
            d,
            hnp.array_shapes(min_dims=0, max_dims=3, max_side=4),
            elements={"min_value": -LARGEST, "max_value": LARGEST} if d.startswith("float") else None,
        )
    ),
    max_size=6,
)


@given(ARRAYS)
def test_round_trip_keeps_every_bit(arrays: dict[str, np.ndarray]) -> None:
    weights = Weights.pack(arrays)
    layout = Layout.from_proto(weights.layout.to_proto().tensors, "me")
    received = Weights.from_record(weights.to_record(), layout, "me")
    assert list(received.views()) == list(arrays)
    for name, view in received.views().items():
        assert view.dtype == arrays[name].dtype
        assert view.shape == arrays[name].shape
        assert view.tobytes() == np.ascontiguousarray(arrays[name]).tobytes()


def test_one_flat_array_per_dtype() -> None:
    weights = Weights.pack({"a": np.ones((2, 3), np.float32), "n": np.array(4), "b": np.zeros(5, np.float32)})
    record = weights.to_record()
    assert {k: v.shape for k, v in record.items()} == {"float32": (11,), "int64": (1,)}
    assert weights.layout.nbytes == weights.nbytes == 11 * 4 + 8


def test_received_buffers_are_views() -> None:
    weights = Weights.pack({"a": np.ones(1000, np.float32)})
    received = Weights.from_record(weights.to_record(), weights.layout, "me")
    assert not received.buffers["float32"].flags.owndata


def record_of(**arrays: Any) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in arrays.items()})


LAYOUT = Layout((TensorSpec("w", "float32", (2, 2)), TensorSpec("b", "float32", (2,))))
GOOD = np.zeros(6, np.float32)


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        (ArrayRecord(), "a tensor is missing or too many"),
        (record_of(float32=GOOD, int64=np.zeros(1, np.int64)), "a tensor is missing or too many"),
        (record_of(float64=np.zeros(6)), "a tensor is missing or too many"),
        (record_of(float32=np.zeros(6)), "the float32 buffer holds float64"),
        (record_of(float32=np.zeros(5, np.float32)), r"shape \(5,\), expected \(6,\)"),
        (record_of(float32=np.zeros((2, 3), np.float32)), r"shape \(2, 3\), expected \(6,\)"),
        (
            record_of(float32=np.array([0, 1, 2, 3, np.nan, 0], np.float32)),
            "tensor 'b' holds a value that is not",
        ),
        (
            record_of(float32=np.array([0, np.inf, 2, 3, 0, 0], np.float32)),
            "tensor 'w' holds a value that is not",
        ),
    ],
)
def test_bad_payload_is_refused_by_name(record: ArrayRecord, fault: str) -> None:
    with pytest.raises(WireError, match=fault) as caught:
        Weights.from_record(record, LAYOUT, "cam-7")
    assert caught.value.sender == "cam-7"
    assert "cam-7" in str(caught.value)


def test_huge_values_are_refused() -> None:
    """They are finite, and what they are added to is not."""
    weights = Weights.pack({"v": np.full(3, 2.0**60, np.float32), "w": np.full(3, 3e38, np.float32)})
    with pytest.raises(WireError, match="tensor 'w' holds a value too large to be added up"):
        Weights.from_record(weights.to_record(), weights.layout, "me")


def test_the_norm_only_clears_and_never_refuses() -> None:
    """Many values at the largest that is let in have a square that no float32 holds."""
    for dtype in (np.float32, np.float64):
        assert fault_of(np.full(1000, -LARGEST, dtype)) == ""
        assert "too large" in fault_of(np.full(1, -np.nextafter(dtype(LARGEST), dtype(np.inf)), dtype))
    assert fault_of(np.full(100_000, np.finfo(np.float16).max, np.float16)) == ""
    assert "not finite" in fault_of(np.array([1, -np.inf], np.float16))


def test_cut_bytes_are_refused() -> None:
    array = Array(GOOD)
    cut = Array(array.dtype, array.shape, array.stype, array.data[:-4])
    with pytest.raises(WireError, match="cannot be read"):
        Weights.from_record(ArrayRecord({"float32": cut}), LAYOUT, "me")
    objects = Array("float32", (6,), "pickle", array.data)
    with pytest.raises(WireError, match="cannot be read"):
        Weights.from_record(ArrayRecord({"float32": objects}), LAYOUT, "me")


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ([("a", "float32", [2]), ("a", "float32", [2])], "repeated"),
        ([("", "float32", [2])], "empty"),
        ([("a", "object", [2])], "unknown dtype 'object'"),
        ([("a", "float32", [4_000_000_000, 4_000_000_000])], "more than"),
        ([(str(i), "float32", [1]) for i in range(20_001)], "20001 tensors"),
    ],
)
def test_bad_layout(tensors: list[tuple[str, str, list[int]]], fault: str) -> None:
    specs = [pb.TensorSpec(name=n, dtype=d, shape=s) for n, d, s in tensors]
    with pytest.raises(WireError, match=fault):
        Layout.from_proto(specs, "edge-1")


def test_difference_says_what() -> None:
    w, b = LAYOUT.tensors
    assert LAYOUT.difference(LAYOUT) == ""
    assert LAYOUT.difference(Layout((w,))) == "tensor 'b' is missing (1 in all)"
    assert "was not asked for" in Layout((w,)).difference(LAYOUT)
    assert "'b' is float32[3], expected float32[2]" in LAYOUT.difference(
        Layout((w, TensorSpec("b", "float32", (3,))))
    )
    assert LAYOUT.difference(Layout((b, w))) == "the tensors are in another order"


def test_bfloat16_travels_as_its_bits() -> None:
    layout = Layout((TensorSpec("w", "bfloat16", (3,)),))
    bits = np.array([0x3F80, 0x4000, 0xBF80], np.uint16)
    weights = Weights.fill(layout, {"w": bits})
    received = Weights.from_record(weights.to_record(), layout, "me")
    assert received.views()["w"].tolist() == bits.tolist()
