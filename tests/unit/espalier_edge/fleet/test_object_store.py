"""What an edge sends lies in memory once: objects are made when asked for, received tensors sent on as they came."""

from __future__ import annotations

from hashlib import sha256
from typing import cast

import numpy as np
import pytest
from flwr.proto.message_pb2 import ObjectTree

from espalier.wire.payload import Weights
from espalier_edge.fleet.object_store import PayloadStore
from espalier_edge.fleet.uploads import Upload, Uploads


def object_of(number: int) -> tuple[str, bytes]:
    content = f"ArrayChunk  1\0{number}".encode()
    return sha256(content).hexdigest(), content


def test_an_offered_object_is_made_on_request_and_dropped() -> None:
    store, (sent, content), made = PayloadStore(), object_of(1), []
    store.preregister(1, ObjectTree(object_id=sent))
    body = memoryview(content)

    def make() -> tuple[memoryview, ...]:
        made.append(1)
        return body[:5], body[5:]

    store.offer(sent, make)
    assert not made
    assert store.get(sent) == content
    pieces = store.pieces(sent)
    assert pieces is not None
    assert all(isinstance(piece, memoryview) and piece.obj is content for piece in pieces)  # no copy is kept
    assert len(made) == 2
    store.delete(sent)
    assert store.get(sent) is None
    assert store.pieces(sent) is None


def test_a_chunk_stays_where_it_came_and_nothing_else_does() -> None:
    store, call = PayloadStore(), b"before" + object_of(1)[1]
    (chunk, content), view = object_of(1), memoryview(call)[6:]
    record = b"ConfigRecord  2\0{}"
    config = sha256(record).hexdigest()
    for object_id in (chunk, config):
        store.preregister(1, ObjectTree(object_id=object_id))
    for bad in (
        view[:-1],
        memoryview(b"ArrayChunk  1\0"),
        memoryview(b"no object"),
        memoryview(object_of(2)[1]),
    ):
        with pytest.raises(ValueError, match=r"match|its header says|not found"):
            store.put(chunk, bad)
    assert store.get(chunk) == b""
    store.put(chunk, view)
    assert cast(object, store.get(chunk)) is view
    assert store.pieces(chunk) is None  # it is another's: Flower's own way out
    store.put(config, memoryview(record))
    assert store.get(config) == record
    assert isinstance(store.get(config), bytes)
    assert content == bytes(view)


def test_what_others_put_into_the_store_is_still_verified() -> None:
    store = PayloadStore()
    (object_id, content), (_, other) = object_of(1), object_of(2)
    store.preregister(1, ObjectTree(object_id=object_id))
    with pytest.raises(ValueError, match="does not match"):
        store.put(object_id, other)
    assert store.get(object_id) == b""
    store.put(object_id, content)
    assert store.get(object_id) == content


def test_a_huge_upload_takes_all_slots() -> None:
    uploads = Uploads(slots=2)
    asked = iter([True, False])  # whether the reply is still wanted: when the upload comes, and once it waits
    assert uploads.admit(Upload(1, "big", big=True), lambda: True)
    assert not uploads.admit(Upload(2, "huge", big=True, huge=True), lambda: next(asked))
    uploads.release("big")
    assert uploads.admit(Upload(2, "huge", big=True, huge=True), lambda: True)
    assert not uploads.admit(Upload(3, "next", big=True), lambda: False)
    uploads.release("huge")
    assert uploads.admit(Upload(3, "next", big=True), lambda: True)
    assert uploads.admit(Upload(4, "beside it", big=True), lambda: True)


def test_received_tensors_are_sent_on_without_a_copy() -> None:
    made = Weights.pack({"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(4)})
    received = Weights.from_record(made.to_record(), made.layout, "edge")
    assert received.to_record() is received.record
    frozen = made.frozen()
    record = frozen.to_record()
    assert record is frozen.record
    for dtype, buffer in frozen.buffers.items():
        np.testing.assert_array_equal(buffer, made.buffers[dtype])
        assert not buffer.flags.writeable
        assert np.shares_memory(buffer, np.frombuffer(record[dtype].data, np.uint8))
