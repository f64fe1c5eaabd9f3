"""What an edge sends lies in memory once: objects are made when asked for, received tensors sent on as they came."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import pytest
from flwr.proto.message_pb2 import ObjectTree

from common.flower.payload_store import RECENT, PayloadStore
from common.flower.uploads import Upload, Uploads
from common.wire.payload import Weights


def object_of(number: int) -> tuple[str, bytes]:
    content = f"ArrayChunk  1\0{number}".encode()
    return sha256(content).hexdigest(), content


def test_an_offered_object_is_made_for_those_who_ask_and_forgotten_with_its_message() -> None:
    store, made = PayloadStore(), []
    objects = dict(object_of(number) for number in range(RECENT + 1))
    for object_id in objects:
        store.preregister(1, ObjectTree(object_id=object_id))

        def make(object_id: str = object_id) -> bytes:
            made.append(object_id)
            return objects[object_id]

        store.offer(object_id, make)
    assert made == []
    first, *others = objects
    assert [store.get(first), store.get(first)] == [objects[first]] * 2
    assert made == [first]  # the second one asked soon after
    assert [store.get(other) for other in others] == [objects[other] for other in others]
    store.get(first)
    assert made == [first, *others, first]
    for object_id in objects:
        store.delete(object_id)
        assert store.get(object_id) is None
    assert not store._recent


def test_nothing_is_kept_ready_while_replies_come() -> None:
    store, (sent, content), (received, reply) = PayloadStore(), object_of(1), object_of(2)
    for object_id in (sent, received):
        store.preregister(1, ObjectTree(object_id=object_id))
    store.offer(sent, lambda: content)
    assert store.get(sent) == content
    assert store._recent
    store.put(received, reply)
    assert not store._recent
    assert store.get(sent) == content  # made anew


def test_what_others_put_into_the_store_is_still_verified() -> None:
    store = PayloadStore()
    (object_id, content), (_, other) = object_of(1), object_of(2)
    store.preregister(1, ObjectTree(object_id=object_id))
    with pytest.raises(ValueError, match="does not match"):
        store.put(object_id, other)
    assert store.get(object_id) == b""
    store.put(object_id, content)
    assert store.get(object_id) == content


def test_a_huge_upload_waits_for_all_slots_and_keeps_others_waiting() -> None:
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
