"""Small objects sent inline with the announcement of their message, which saves a call for each of them.

A Flower message is a tree of objects (message, records, Arrays, chunks), and the Fleet API transfers each in a
separate call. Between two Espalier nodes, small objects are put into the ``content`` of the announcement, which is
empty otherwise. They are the same objects under the same hashes, so later steps do not change. Stock nodes ignore them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable

from flwr.app.message.arraychunk import ArrayChunk
from flwr.proto.message_pb2 import Message as ProtoMessage

from espalier.flower.payloads import Packed

#: Key of the record in the content of an announcement, and key of the objects in that record.
RECORD, OBJECTS = "espalier.early", "objects"
#: Maximum bytes of inline objects per announcement. A call costs about a millisecond of CPU time at both ends, as do
#: the additional copies of some megabytes; but the answers to polls of many nodes should not hold megabytes each.
MAX_INLINE_BYTES = 256 << 10
#: Result code of an Espalier server for a reply that it accepts; 0 for a refused one, and for any at a stock server.
ACCEPTED = 1


def select_inline(packed: Packed) -> list[bytes]:
    """Return the objects to send inline: first the descriptions, outermost first, then chunks while they fit."""
    chunks: list[str] = []
    others: list[str] = []
    for object_id, item in packed.objects.items():
        (chunks if isinstance(item, ArrayChunk) else others).append(object_id)
    found, remaining = [], MAX_INLINE_BYTES
    for object_id in (*reversed(others), *chunks):
        item = packed.objects[object_id]
        if isinstance(item, ArrayChunk) and len(item.data) > remaining:
            continue  # avoids serialising it
        content = packed.content(object_id)
        if len(content) <= remaining:
            found.append(content)
            remaining -= len(content)
    return found


def attach(announcement: ProtoMessage, objects: Iterable[bytes]) -> None:
    """Add objects to an announcement, whose content must be empty."""
    item = announcement.content.items.add(key=RECORD)
    item.config_record.items.add(key=OBJECTS).value.bytes_list.vals.extend(objects)


def detach(announcement: ProtoMessage, wanted: Collection[str]) -> dict[str, bytes]:
    """Remove the inline objects from an announcement and return them.

    Parameters
    ----------
    announcement : Message
        As received; its content is empty afterwards.
    wanted : collection of str
        Ids of the message's objects. Objects with other hashes, and those beyond `MAX_INLINE_BYTES`, are ignored.

    Returns
    -------
    dict
        The objects by id, verified; empty if the sender is a stock node.
    """
    remaining, found = MAX_INLINE_BYTES, {}
    for item in announcement.content.items:
        if item.key == RECORD and item.HasField("config_record"):
            for entry in item.config_record.items:
                for content in entry.value.bytes_list.vals:
                    remaining -= len(content)
                    if remaining < 0:
                        break
                    object_id = hashlib.sha256(content).hexdigest()
                    if object_id in wanted:
                        found[object_id] = content
    if announcement.HasField("error"):
        announcement.ClearField("content")
    elif found:
        announcement.content.Clear()
    return found
