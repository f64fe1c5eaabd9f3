"""What the cloud asks its SuperLink over HTTP: no oftener than needed, several objects at a time, in any order."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from espalier.flower.arrays import array_from_numpy
from espalier.flower.payloads import pack, tree_ids
from espalier_server.superlink import grid as cloud_grid
from espalier_server.superlink.grid import NODES_CACHED, PARALLEL_CHUNKS, PARALLEL_SMALL, TreeGrid, _Arriving


class Link:
    """A SuperLink's answers about the objects of one reply."""

    def __init__(self, message: Message) -> None:
        packed = pack(message)
        self.reply_id, self.order = packed.message_id, tree_ids(packed.tree)
        self.there = {object_id: packed.content(object_id) for object_id in packed.objects}
        self.late: set[str] = set()
        self.most = self.now = self.nodes_asked = 0
        self.freed: list[str] = []
        self._lock = threading.Lock()

    def PullObject(self, request: Any) -> PullObjectResponse:  # noqa: N802 - Flower's name
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.01)
        with self._lock:
            self.now -= 1
        known, ready = request.object_id in self.there, request.object_id not in self.late
        content = self.there[request.object_id] if known and ready else b""
        return PullObjectResponse(
            object_found=known, object_available=known and ready, object_content=content
        )

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802 - Flower's name
        self.freed.append(request.message_object_id)


class Http(HttpGrid):
    """A grid whose calls end in a Link."""

    def __init__(self, link: Link) -> None:
        super().__init__(token="x")
        self.link = link

    @property
    def _runtime_client(self) -> Any:
        return self.link

    @property
    def run(self) -> Any:
        return type("Run", (), {"run_id": 1})()

    def get_nodes(self) -> list[NodeInfo]:
        self.link.nodes_asked += 1
        return [NodeInfo(node_id=7), NodeInfo(node_id=9)]


def reply_of(elements: int) -> tuple[TreeGrid, Link, _Arriving]:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    sent = Message(RecordDict(), 7, "train")
    arrays = ArrayRecord({"w": array_from_numpy(np.arange(elements, dtype=np.float32))})
    link = Link(Message(RecordDict({"arrays": arrays}), reply_to=sent))
    return TreeGrid(Http(link)), link, _Arriving(sent, link.reply_id, list(link.order))


@pytest.mark.parametrize(("elements", "at_once"), [(10, PARALLEL_SMALL), (9_000_000, PARALLEL_CHUNKS)])
def test_objects_are_fetched_a_few_at_a_time(elements: int, at_once: int) -> None:
    grid, link, one = reply_of(elements)
    reply = grid._fetch(one)
    assert reply is not None
    assert reply.has_content()
    assert 1 < link.most <= at_once
    assert link.freed == [link.reply_id]


def test_missing_objects_are_requested_again() -> None:
    grid, link, one = reply_of(10)
    link.late = {link.order[0], link.order[2]}
    assert grid._fetch(one) is None
    assert one.missing[:2] == [link.order[0], link.order[2]]
    assert set(one.contents) == {link.order[1], link.order[3]}
    assert not link.freed
    link.late = set()
    reply = grid._fetch(one)
    assert reply is not None
    assert reply.has_content()


def test_a_reply_that_is_gone_or_stands_still_becomes_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, link, one = reply_of(10)
    del link.there[link.order[1]]
    gone = grid._fetch(one)
    assert gone is not None
    assert "ended early" in str(gone.error.reason)
    grid, link, one = reply_of(10)
    link.late = {link.order[0]}
    monkeypatch.setattr(cloud_grid, "STALL_CHECK", 0.0)
    monkeypatch.setattr(cloud_grid, "CLOUD_UPLOAD_STALL", -1.0)
    still = grid._fetch(one)
    assert still is not None
    assert "stalled" in str(still.error.reason)
    assert link.freed == [link.reply_id]


def test_a_node_that_sends_chunks_first_counts_as_active(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stock one does; what describes is asked for first, and comes last."""
    grid, link, one = reply_of(4_000_000)
    chunks = {i for i in link.order if link.there[i].startswith(b"ArrayChunk")}
    one.missing.sort(key=chunks.__contains__)  # as a reply is announced
    link.late = set(link.order) - chunks
    assert grid._fetch(one) is None
    assert not one.contents
    monkeypatch.setattr(cloud_grid, "STALL_CHECK", 0.0)
    assert grid._fetch(one) is None  # nothing moved: the other end of the list is next
    began = one.progress_at
    assert grid._fetch(one) is None
    assert one.progress_at > began
    assert one.contents.keys() & chunks
    link.late = set()
    while (reply := grid._fetch(one)) is None:
        pass
    assert reply.has_content()


def test_an_invalid_chunk_refuses_the_reply() -> None:
    grid, link, one = reply_of(4_000_000)
    chunks = {i for i in link.order if link.there[i].startswith(b"ArrayChunk")}
    one.missing.sort(key=chunks.__contains__)
    link.there[one.missing[-1]] = b"ArrayChunk  9\0short"
    while (reply := grid._fetch(one)) is None:
        pass
    assert "its reply is refused" in str(reply.error.reason)


def test_an_answer_about_the_nodes_is_good_for_a_moment() -> None:
    grid, link, _ = reply_of(10)
    for _ in range(5):
        assert list(grid.get_node_ids()) == [node.node_id for node in grid.get_nodes()] == [7, 9]
    assert link.nodes_asked == 1
    time.sleep(NODES_CACHED + 0.01)
    grid.get_nodes()
    assert link.nodes_asked == 2
