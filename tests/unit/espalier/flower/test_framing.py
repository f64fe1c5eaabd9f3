"""The two calls that carry objects: protobuf's bytes to the last one, and its word on whatever else comes."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from flwr.proto.message_pb2 import PullObjectResponse, PushObjectRequest
from flwr.proto.node_pb2 import Node
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from espalier.flower import framing
from espalier.flower.framing import ObjectAnswer, ObjectPush

BIG = bytes(range(256)) * (framing.MIN_VIEW_BYTES // 256)
SIZES = (
    0,
    1,
    127,
    128,
    framing.MIN_VIEW_BYTES - 1,
    framing.MIN_VIEW_BYTES,
    framing.MIN_VIEW_BYTES + 1,
    (1 << 21) - 1,
    1 << 21,
)


def filler(size: int) -> bytes:
    return (BIG * (size // len(BIG) + 1))[:size]


def fields(found: Any) -> tuple[Any, ...]:
    """Return what a reader sees of a request or of an answer."""
    if isinstance(found, ObjectPush | PushObjectRequest):
        return (
            found.node.node_id,
            found.run_id,
            found.object_id,
            found.session_id,
            bytes(found.object_content),
        )
    return (found.object_found, found.object_available, bytes(found.object_content))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cut", [0, 1, 60])
def test_a_request_has_the_bytes_of_protobuf(size: int, cut: int) -> None:
    content = filler(size)
    for node, run, object_id, session in (
        (Node(node_id=2**63 + 1), 2**64 - 1, "a" * 64, "s"),
        (Node(), 0, "", ""),
    ):
        theirs = PushObjectRequest(
            node=node, run_id=run, object_id=object_id, object_content=content, session_id=session
        )
        ours = ObjectPush(node, run, object_id, session, (content[:cut], memoryview(content)[cut:]))
        data = theirs.SerializeToString()
        assert framing.push_to_bytes(ours) == framing.push_to_bytes(theirs) == data
        read = framing.push_from_bytes(data)
        assert isinstance(read, ObjectPush) == (size >= framing.MIN_VIEW_BYTES)
        assert fields(read) == fields(theirs)


@pytest.mark.parametrize("size", SIZES)
def test_an_answer_has_the_bytes_of_protobuf(size: int) -> None:
    content = filler(size)
    for found, available in ((True, True), (True, False), (False, False)):
        theirs = PullObjectResponse(object_found=found, object_available=available, object_content=content)
        data = theirs.SerializeToString()
        assert framing.answer_to_bytes(ObjectAnswer(found, available, (content,))) == data
        assert framing.answer_to_bytes(theirs) == data
        read = framing.answer_from_bytes(data)
        assert isinstance(read, ObjectAnswer) == (size >= framing.MIN_VIEW_BYTES)
        assert fields(read) == fields(theirs)


def test_large_content_is_not_copied() -> None:
    data = PushObjectRequest(object_content=BIG, session_id="s").SerializeToString()
    content = framing.push_from_bytes(data).object_content
    assert isinstance(content, memoryview)
    assert content.obj is data
    assert content.readonly


def agree(data: bytes) -> None:
    """Hold both readers against protobuf: the same fields, or refused alike."""
    for ours, theirs in (
        (framing.push_from_bytes, PushObjectRequest.FromString),
        (framing.answer_from_bytes, PullObjectResponse.FromString),
    ):
        try:
            expected: Any = theirs(data)
        except DecodeError:
            with pytest.raises(DecodeError):
                ours(data)
        else:
            assert fields(ours(data)) == fields(expected)


CONTENT = b"\x22\x80\x80\x04" + BIG  # field 4, 64 KiB
ODD = {
    "a content twice": CONTENT + CONTENT,
    "a content and a small one": CONTENT + b"\x22\x01x",
    "fields in another order": b"\x2a\x01s" + CONTENT + b"\x10\x05",
    "a node in two parts": b"\x0a\x02\x08\x07" + b"\x0a\x00" + CONTENT,
    "an unknown field": b"\x10\x05" + CONTENT + b"\x30\x01" + b"\x3a\x03abc",
    "an unknown field of a high number": CONTENT + b"\xa2\x06\x01x",
    "a group": CONTENT + b"\x33\x08\x01\x34",
    "a group that never ends": CONTENT + b"\x33\x08\x01",
    "fixed-size fields": CONTENT + b"\x35abcd" + b"\x39abcdefgh",
    "field 0": CONTENT + b"\x02\x00",
    "wire type 7": CONTENT + b"\x37",
    "a content that is a number": b"\x20\x05" + CONTENT,
    "a number with a string's tag": b"\x12" + CONTENT[1:],
    "a length beyond the end": b"\x22\xff\xff\xff\x7f" + BIG,
    "a length of ten bytes": b"\x22" + b"\x80" * 9 + b"\x01" + BIG,
    "a length that never ends": b"\x22" + b"\xff" * framing.MIN_VIEW_BYTES,
    "a long overlong length": b"\x22\x80\x80\x84\x80\x80\x80\x80\x00" + BIG,
    "an overlong length": b"\x22\x80\x80\x84\x00" + BIG,
    "a number that is cut": CONTENT + b"\x28\x80",
    "a tag that is cut": CONTENT + b"\x80",
    "a name that is no text": b"\x1a\x02\xff\xfe" + CONTENT,
    "a session that is no text": CONTENT + b"\x2a\x02\xff\xfe",
    "a number of eleven bytes": b"\x10" + b"\xff" * 10 + b"\x01" + CONTENT,
    "a number of ten bytes": b"\x10" + b"\xff" * 9 + b"\x01" + CONTENT,
    "nothing": b"",
}


@pytest.mark.parametrize("name", ODD)
def test_protobuf_has_the_last_word_on_what_it_would_not_write(name: str) -> None:
    agree(ODD[name])
    agree(ODD[name].replace(b"\x22\x80\x80\x04", b"\x1a\x80\x80\x04"))  # the content of an answer


@given(seed=st.integers(0, 2**32 - 1))
def test_mutants_are_read_as_protobuf_reads_them(seed: int) -> None:
    rng = Random(seed)
    theirs = PushObjectRequest(
        node=Node(node_id=rng.getrandbits(64)), run_id=rng.getrandbits(64), object_id="a" * 64, session_id="s"
    )
    theirs.object_content = BIG
    data = bytearray(theirs.SerializeToString())
    edges = [*range(100), *range(len(data) - 20, len(data))]  # heads and tails: what lies between is content
    for _ in range(rng.randint(1, 4)):
        at = min(rng.choice(edges), len(data) - 1)
        match rng.randrange(3):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                del data[at : at + rng.randint(1, 8)]
            case _:
                data[at:at] = rng.randbytes(rng.randint(1, 8))
    agree(bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))]))
