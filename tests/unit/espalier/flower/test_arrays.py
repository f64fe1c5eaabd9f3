"""Arrays and messages taken apart and put together: byte for byte as Flower does it, and nothing damaged accepted."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.serde import config_record_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from espalier.flower.arrays import array_from_numpy, numpy_view, payload_bytes
from espalier.flower.payloads import PayloadError, content_id, count_chunks, pack, tree_ids, unpack

MIB = 1024 * 1024


def metadata() -> Metadata:
    return Metadata(7, "", 1, 2, "", "3", 1.75e9, 60.0, "train")


def message(content: RecordDict) -> Message:
    return make_message(metadata(), content=content)


@given(
    hnp.arrays(
        dtype=st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.uint16, np.float16, np.bool_]),
        shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    )
)
@settings(max_examples=60, deadline=None)
def test_an_array_is_what_flower_makes_of_it(values: np.ndarray[Any, Any]) -> None:
    ours = array_from_numpy(values)
    theirs = Array(values)
    assert (ours.dtype, ours.shape, ours.stype, ours.data) == (
        theirs.dtype,
        theirs.shape,
        theirs.stype,
        theirs.data,
    )
    back = numpy_view(ours)
    assert back.dtype == values.dtype
    np.testing.assert_array_equal(back, values)
    assert not back.flags.writeable


def test_an_array_that_is_not_contiguous_keeps_its_values() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T[1:]
    np.testing.assert_array_equal(numpy_view(array_from_numpy(values)), values)
    np.testing.assert_array_equal(array_from_numpy(values).numpy(), values)


def test_a_view_reads_fortran_order_too() -> None:
    values = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(numpy_view(Array(values)), values)


def test_a_view_shares_the_bytes() -> None:
    array = array_from_numpy(np.zeros(1000, np.float32))
    view = numpy_view(array)
    start = np.frombuffer(array.data, np.uint8).__array_interface__["data"][0]
    assert start < view.__array_interface__["data"][0] < start + len(array.data)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"data": b"nothing like it"}, "magic"),
        ({"dtype": "float64"}, "the header has"),
        ({"shape": (4, 1)}, "the header has"),
        ({"stype": "pickle"}, "pickle"),
    ],
)
def test_a_damaged_array_is_refused(change: dict[str, Any], fault: str) -> None:
    whole = array_from_numpy(np.ones(4, np.float32))
    parts = {"dtype": whole.dtype, "shape": whole.shape, "stype": whole.stype, "data": whole.data, **change}
    with pytest.raises(ValueError, match=fault):
        numpy_view(Array(**parts))


@pytest.mark.parametrize("cut", [-1, -8, 1])
def test_an_array_of_the_wrong_length_is_refused(cut: int) -> None:
    whole = array_from_numpy(np.ones(4, np.float32))
    data = whole.data[:cut] if cut < 0 else whole.data + b"\0" * cut
    with pytest.raises(ValueError, match="bytes of data"):
        numpy_view(Array(whole.dtype, whole.shape, whole.stype, data))


def test_objects_are_never_pickled() -> None:
    with pytest.raises(ValueError, match="Python objects"):
        array_from_numpy(np.array([object()]))


def test_payload_bytes_by_hand() -> None:
    config = ConfigRecord({"a": b"12345"})
    content = RecordDict({"w": ArrayRecord({"x": array_from_numpy(np.zeros(10, np.float32))}), "c": config})
    assert payload_bytes(content) == 128 + 40 + config_record_to_proto(config).ByteSize()
    assert payload_bytes(RecordDict()) == 0


def big_message() -> Message:
    """Arrays of several chunks, some of them equal within an array and between two."""
    rng = np.random.default_rng(0)
    one = rng.integers(0, 255, 11 * MIB, dtype=np.uint8)
    same, longer = np.zeros(20 * MIB, np.uint8), np.zeros(20 * MIB + 1, np.uint8)
    arrays = ArrayRecord(
        {"a": Array(one), "b": Array(same), "c": Array(longer), "d": Array(np.zeros(0, np.float32))}
    )
    return message(RecordDict({"w": arrays, "m": MetricRecord({"n": 3}), "c": ConfigRecord({"k": b"\x1f"})}))


def test_packing_agrees_with_flower() -> None:
    sent = big_message()
    theirs = big_message()
    sent.metadata.message_type = theirs.metadata.message_type = "train"
    packed = pack(sent)
    assert packed.tree == get_object_tree(theirs)
    assert sent.metadata.message_id == packed.message_id == theirs.object_id
    deflated = {object_id: held.deflate() for object_id, held in get_all_nested_objects(theirs).items()}
    assert {object_id: packed.content(object_id) for object_id in packed.objects} == deflated
    assert all(hashlib.sha256(content).hexdigest() == object_id for object_id, content in deflated.items())
    assert set(tree_ids(packed.tree)) == set(deflated)


def test_unpacking_agrees_with_flower() -> None:
    packed = pack(big_message())
    contents = {object_id: packed.content(object_id) for object_id in packed.objects}
    theirs = inflate_object_from_contents(packed.message_id, dict(contents))
    ours = unpack(packed.message_id, contents)
    assert contents == {}
    assert isinstance(theirs, Message)
    assert ours.content["w"].keys() == theirs.content["w"].keys()
    for name, array in theirs.content.array_records["w"].items():
        assert ours.content.array_records["w"][name].data == array.data
    assert ours.content["m"] == theirs.content["m"]
    assert ours.content["c"] == theirs.content["c"]
    assert pack(ours).message_id == packed.message_id


def test_an_error_travels_too() -> None:
    packed = pack(make_message(metadata(), error=Error(2, "no")))
    back = unpack(packed.message_id, {key: packed.content(key) for key in packed.objects})
    assert back.has_error()
    assert back.error.reason == "no"


def test_a_changed_array_is_packed_anew() -> None:
    record = ArrayRecord({"a": array_from_numpy(np.zeros(3, np.float32))})
    first = pack(message(RecordDict({"w": record}))).message_id
    record["a"] = array_from_numpy(np.ones(3, np.float32))
    assert pack(message(RecordDict({"w": record}))).message_id != first


@pytest.mark.parametrize("damage", ["missing", "cut", "foreign class", "not a message"])
def test_what_does_not_fit_together_is_refused(damage: str) -> None:
    packed = pack(big_message())
    contents = {object_id: packed.content(object_id) for object_id in packed.objects}
    root = packed.message_id
    chunk = next(key for key, content in contents.items() if content.startswith(b"ArrayChunk"))
    if damage == "missing":
        del contents[chunk]
    elif damage == "cut":
        contents[chunk] = contents[chunk][:-1]
    elif damage == "foreign class":
        contents[chunk] = contents[chunk].replace(b"ArrayChunk", b"Popen.call", 1)
    else:
        root = next(key for key, content in contents.items() if content.startswith(b"MetricRecord"))
    with pytest.raises(PayloadError):
        unpack(root, contents)


def test_chunks_are_counted() -> None:
    # a: 3; b and c: header, one chunk of zeros for three, remainder; d: 1.
    assert count_chunks(pack(big_message()).tree) == 3 + 3 + 3 + 1
    assert count_chunks(pack(message(RecordDict())).tree) == 0


def test_a_verified_payload_keeps_its_id_and_is_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until somebody changes it: then the id is another's."""
    sent = ArrayRecord({"float32": array_from_numpy(np.arange(5, dtype=np.float32))})
    packed = pack(message(RecordDict({"arrays": sent})))
    contents = {object_id: packed.content(object_id) for object_id in packed.objects}
    received = unpack(packed.message_id, contents, verified=True).content["arrays"]
    assert isinstance(received, ArrayRecord)
    with monkeypatch.context() as patch:
        patch.setattr("espalier.flower.payloads._slice", lambda array: pytest.fail("hashed again"))
        assert content_id(received) == content_id(sent)
    array = received["float32"]
    array.data = array.data[:-1] + b"\x41"
    assert content_id(received) != content_id(sent)
    received["float32"] = sent["float32"]
    assert content_id(received) == content_id(sent)
