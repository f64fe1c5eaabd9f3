"""Small objects travel with an announcement, under their own hashes, and no more of them than there is room for."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.task_identity import TaskIdentity

from espalier.flower.inline_objects import MAX_INLINE_BYTES, OBJECTS, RECORD, attach, detach, select_inline
from espalier.flower.payloads import Packed, pack, tree_ids, unpack

KIB = 1024


@pytest.fixture(autouse=True)
def _identity() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def message(size: int) -> Message:
    numbers = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    arrays = ArrayRecord({"flat": Array(numbers)})
    return Message(RecordDict({"arrays": arrays, "config": ConfigRecord({"plan": b"p" * 300})}), 7, "train")


def announced(held: Message, packed: Packed) -> ProtoMessage:
    light = message_to_proto(remove_content_from_message(held))
    attach(light, select_inline(packed))
    return ProtoMessage.FromString(light.SerializeToString())


def ids(packed: Packed) -> set[str]:
    return set(tree_ids(packed.tree))


def test_a_small_message_travels_whole() -> None:
    held = message(4 * KIB)
    packed = pack(held)
    contents = detach(announced(held, packed), ids(packed))
    assert contents.keys() == ids(packed)
    came = unpack(packed.message_id, contents)
    assert came.content == held.content


def test_of_a_big_message_all_but_its_chunks_travels() -> None:
    held = message(11 << 20)  # three chunks of at most 5 MiB
    packed = pack(held)
    contents = detach(announced(held, packed), ids(packed))
    left = ids(packed) - contents.keys()
    assert len(left) == 3
    assert {type(packed.objects[object_id]).__name__ for object_id in left} == {"ArrayChunk"}


@pytest.mark.parametrize("size", [MAX_INLINE_BYTES - 64 * KIB, MAX_INLINE_BYTES + 64 * KIB])
def test_there_is_room_for_so_many_bytes(size: int) -> None:
    packed = pack(message(size))
    found = select_inline(packed)
    assert sum(map(len, found)) <= MAX_INLINE_BYTES
    assert (len(found) == len(packed.objects)) == (size < MAX_INLINE_BYTES)


def test_the_announcement_equals_one_without_objects() -> None:
    held = message(KIB)
    packed = pack(held)
    plain = message_to_proto(remove_content_from_message(held))
    proto = announced(held, packed)
    assert proto != plain
    detach(proto, ids(packed))
    assert proto == plain


def test_an_error_comes_along_and_stays_one() -> None:
    held = Message(Error(7, "no"), reply_to=message(KIB))
    packed = pack(held)
    proto = announced(held, packed)
    contents = detach(proto, ids(packed))
    assert message_from_proto(proto).error.reason == "no"
    assert unpack(packed.message_id, contents).error.reason == "no"


def test_what_has_another_hash_is_none_of_the_message() -> None:
    held = message(KIB)
    packed = pack(held)
    light = message_to_proto(remove_content_from_message(held))
    good, *others = select_inline(packed)
    attach(light, [b"strange", others[0] + b"\0", good])
    assert detach(light, ids(packed)) == {hashlib.sha256(good).hexdigest(): good}


def test_what_is_beyond_the_room_is_passed_over() -> None:
    held = message(KIB)
    packed = pack(held)
    light = message_to_proto(remove_content_from_message(held))
    first, second, *_ = select_inline(packed)
    attach(light, [first, bytes(MAX_INLINE_BYTES), second])
    assert list(detach(light, ids(packed)).values()) == [first]


def test_other_content_is_no_objects() -> None:
    light = message_to_proto(remove_content_from_message(message(KIB)))
    assert detach(light, {"a" * 64}) == {}
    item = light.content.items.add(key=RECORD)
    item.metric_record.items.add(key=OBJECTS).value.double = 1.0
    light.content.items.add(key="other").config_record.items.add(key=OBJECTS).value.bytes = b"x"
    assert detach(light, {hashlib.sha256(b"x").hexdigest()}) == {}
