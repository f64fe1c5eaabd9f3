"""Small objects travel with the message that announces them: one call instead of one for each.

A Flower message is a tree of objects (message, records, arrays, chunks), and the Fleet API fetches and brings each with
a call of its own. Where both ends are ours, those that are small lie in the announcement's own ``content``, which is
empty else: the same objects under the same hashes, so nothing of what follows changes. Other ends do not look there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable

from flwr.app.message.arraychunk import ArrayChunk
from flwr.proto.message_pb2 import Message as ProtoMessage

from espalier.flower.payloads import Packed

#: Key of the record in an announcement's content, and of the objects in it.
RECORD, OBJECTS = "espalier.early", "objects"
#: Bytes of objects that an announcement takes along. A call costs about a millisecond of both ends' processors, and so
#: do the further copies of some megabytes; a poll that many nodes make should still not carry megabytes each.
MOST = 256 << 10
#: What a server of ours says of a reply that it takes; one that it does not want has 0, as all have at a stock one.
TAKEN = 1


def early_objects(packed: Packed) -> list[bytes]:
    """Return the objects of a message that go with its announcement, the inner ones last.

    Those that describe are always small; chunks follow as far as there is room.
    """
    chunks: list[str] = []
    others: list[str] = []
    for object_id, held in packed.objects.items():
        (chunks if isinstance(held, ArrayChunk) else others).append(object_id)
    found, room = [], MOST
    for object_id in (*reversed(others), *chunks):
        held = packed.objects[object_id]
        if isinstance(held, ArrayChunk) and len(held.data) > room:
            continue  # not serialised in vain
        content = packed.content(object_id)
        if len(content) <= room:
            found.append(content)
            room -= len(content)
    return found


def attach(announcement: ProtoMessage, objects: Iterable[bytes]) -> None:
    """Put objects into an announcement, whose content must be empty."""
    item = announcement.content.items.add(key=RECORD)
    item.config_record.items.add(key=OBJECTS).value.bytes_list.vals.extend(objects)


def detach(announcement: ProtoMessage, wanted: Collection[str]) -> dict[str, bytes]:
    """Take the objects out of an announcement.

    Parameters
    ----------
    announcement : Message
        As it came; afterwards it is as one that took nothing along.
    wanted : collection of str
        Ids of the message's objects. What has another hash is passed over, and so is what is beyond `MOST`.

    Returns
    -------
    dict
        The objects by their ids, verified; {} where the other end is not ours.
    """
    room, found = MOST, {}
    for item in announcement.content.items:
        if item.key == RECORD and item.HasField("config_record"):
            for entry in item.config_record.items:
                for content in entry.value.bytes_list.vals:
                    room -= len(content)
                    if room < 0:
                        break
                    object_id = hashlib.sha256(content).hexdigest()
                    if object_id in wanted:
                        found[object_id] = content
    if announcement.HasField("error"):
        announcement.ClearField("content")
    elif found:
        announcement.content.Clear()
    return found
