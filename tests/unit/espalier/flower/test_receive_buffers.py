"""Chunks of an Array that is known lie in its bytes as they come; whatever does not fit stays what it is."""

from __future__ import annotations

import json
from hashlib import sha256
from itertools import pairwise

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata

from espalier.flower.arrays import array_from_numpy, blank_array, blank_bytes, npy_size, numpy_view
from espalier.flower.payloads import Content, Packed, chunk_ids, in_place, pack, tree_ids, unpack
from espalier.flower.receive_buffers import CHUNK, ReceiveBuffers
from espalier_edge.fleet.object_store import PayloadStore

#: Three chunks: two whole ones and what is left.
NUMBERS = np.random.default_rng(3).random(2 * CHUNK // 4 + 1000, np.float32)


def packed_of(*arrays: Array) -> Packed:
    record = ArrayRecord({f"a{n}": array for n, array in enumerate(arrays)})
    metadata = Metadata(1, "", 1, 2, "", "", 0.0, 60.0, "train")
    return pack(make_message(metadata=metadata, content=RecordDict({"w": record})))


def came(buffers: ReceiveBuffers, packed: Packed) -> dict[str, Content]:
    """Return what a receiver holds once all has come: what describes first, each object where buffers put it."""
    chunks = chunk_ids(packed.tree)
    contents: dict[str, Content] = {}
    for object_id in sorted(tree_ids(packed.tree), key=chunks.__contains__):
        content = memoryview(b"call" + packed.content(object_id))[4:]  # as a call's bytes hold it
        buffers.allocate(object_id, content)
        contents[object_id] = buffers.place(object_id, content)
    return contents


def numbers_in(message: Message, name: str = "a0") -> np.ndarray:
    record = message.content["w"]
    assert isinstance(record, ArrayRecord)
    return numpy_view(record[name])


def test_an_array_is_the_bytes_that_its_chunks_were_put_to() -> None:
    packed = packed_of(array_from_numpy(NUMBERS))
    contents = came(ReceiveBuffers(), packed)
    placed = [c for c in contents.values() if isinstance(c, tuple)]
    assert len(placed) == 3
    [whole] = {id(view.obj) for _, view in placed}
    assert [b"".join(c) for c in placed] == [
        packed.content(i) for i in packed.objects if i in chunk_ids(packed.tree)
    ]
    message = unpack(packed.message_id, contents)
    record = message.content["w"]
    assert isinstance(record, ArrayRecord)
    assert id(record["a0"].data) == whole  # no copy was made
    np.testing.assert_array_equal(numbers_in(message), NUMBERS)


def test_store_receives_verified_chunks_and_releases_the_buffer() -> None:
    packed, store = packed_of(array_from_numpy(NUMBERS)), PayloadStore()
    store.preregister(1, packed.tree)
    chunks = chunk_ids(packed.tree)
    for object_id in sorted(tree_ids(packed.tree), key=chunks.__contains__):
        content = packed.content(object_id)
        if object_id in chunks:
            with pytest.raises(ValueError, match="does not match"):
                store.put(object_id, memoryview(content[:-1] + b"\xff"))
            store.put(object_id, memoryview(content))
        else:
            store.put(object_id, content)
        assert store.get(object_id) == content
    contents = {object_id: store.content(object_id) for object_id in tree_ids(packed.tree)}
    assert sum(isinstance(content, tuple) for content in contents.values()) == 3
    store.delete(packed.message_id)
    assert not store._buffers._buffers
    assert not store._buffers._slots
    np.testing.assert_array_equal(numbers_in(unpack(packed.message_id, contents, verified=True)), NUMBERS)


def test_a_chunk_of_two_arrays_is_in_both() -> None:
    other = NUMBERS.copy()
    other[-1] = 7.0
    packed = packed_of(array_from_numpy(NUMBERS), array_from_numpy(other))
    message = unpack(packed.message_id, came(ReceiveBuffers(), packed))
    np.testing.assert_array_equal(numbers_in(message, "a0"), NUMBERS)
    np.testing.assert_array_equal(numbers_in(message, "a1"), other)


@pytest.mark.parametrize(
    "array",
    [
        array_from_numpy(np.zeros(3 * CHUNK, np.uint8)),  # its chunks are one, many times
        array_from_numpy(NUMBERS[:100]),  # small
        Array("float32", (4, 5), "mine", NUMBERS.tobytes()),  # another's serialisation
        Array("float32", (len(NUMBERS) * 3,), "numpy.ndarray", NUMBERS.tobytes()),  # claims more than comes
        Array("no dtype", (len(NUMBERS),), "numpy.ndarray", NUMBERS.tobytes()),
    ],
)
def test_of_other_arrays_the_chunks_stay_as_they_came(array: Array) -> None:
    packed = packed_of(array)
    contents = came(ReceiveBuffers(), packed)
    assert not any(isinstance(content, tuple) for content in contents.values())
    record = unpack(packed.message_id, contents).content["w"]
    assert isinstance(record, ArrayRecord)
    assert record["a0"].data == array.data


def test_a_chunk_of_another_size_than_its_place_stays_as_it_came() -> None:
    buffers = ReceiveBuffers()
    ids = [sha256(bytes([n])).hexdigest() for n in range(3)]
    said = {
        "dtype": "float32",
        "shape": [len(NUMBERS)],
        "stype": "numpy.ndarray",
        "arraychunk_ids": [0, 1, 2],
    }
    body = json.dumps(said).encode()
    described = f"Array {','.join(ids)} {len(body)}".encode() + b"\0" + body
    assert buffers.allocate("a", described) == npy_size("float32", NUMBERS.shape)
    short = b"ArrayChunk  5\0short"
    assert buffers.place(ids[0], short) is short
    for unreadable in (b"ArrayChunk  5\0shorter", b"no object at all", b""):
        assert buffers.place(ids[0], unreadable) is unreadable  # to be refused by name when it is unpacked
    record = b"ConfigRecord  2\0{}"
    assert buffers.place(ids[1], record) is record
    assert buffers.allocate("b", b"no object at all") == 0


def test_an_array_that_claims_more_than_there_is_gets_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(size: int) -> tuple[bytes, np.ndarray]:
        raise MemoryError(size)

    monkeypatch.setattr("espalier.flower.receive_buffers.blank_bytes", exhausted)
    packed = packed_of(array_from_numpy(NUMBERS))
    contents = came(ReceiveBuffers(), packed)
    assert not any(isinstance(content, tuple) for content in contents.values())
    np.testing.assert_array_equal(numbers_in(unpack(packed.message_id, contents)), NUMBERS)


def test_views_are_in_place_only_where_they_make_up_the_whole() -> None:
    data = bytes(range(10))
    view = memoryview(data)
    cuts = [0, 3, 4, 10]
    parts = [view[a:b] for a, b in pairwise(cuts)]
    assert in_place(parts, 10) is data
    assert in_place([view], 10) is data
    for wrong in ([], parts[:2], parts[::-1], [parts[0], parts[0], parts[2]], [view[:0], view], [view[1:]]):
        assert in_place(wrong, sum(map(len, wrong))) is None
    assert in_place([memoryview(bytearray(data))], 10) is None


def test_uninitialised_bytes_live_as_long_as_their_views() -> None:
    data, memory = blank_bytes(5)
    memory[:] = range(5)
    assert data == bytes(range(5))
    del data
    assert memory.tolist() == [0, 1, 2, 3, 4]
    for few in (0, 1):
        with pytest.raises(ValueError, match="CPython shares"):
            blank_bytes(few)


@pytest.mark.parametrize("shape", [(), (0,), (3, 4)])
def test_a_blank_array_is_flowers(shape: tuple[int, ...]) -> None:
    array, numbers = blank_array("float16", shape)
    assert array.data == Array(np.zeros(shape, np.float16)).data
    assert len(array.data) == npy_size("float16", shape)
    numbers[...] = 2.0
    assert array.data == Array(np.full(shape, 2.0, np.float16)).data
