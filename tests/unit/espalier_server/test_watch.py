"""Edges that lost their window are found, silent ones get no part until they answer, and returning ones do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from espalier.security.name_registry import NameRegistry
from espalier.wire import control
from espalier_edge.rounds import EdgeProgress
from espalier_proto import espalier_pb2 as pb
from espalier_server.client_keys import ClientKeys
from espalier_server.planning.tree import ROSTER_AGE, Tree
from espalier_server.records.events import EventLog, read_events
from espalier_server.watch import Watch

TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
RUN = "r"


class FakeGrid:
    """Edges 1 and 2; those in `mute` do not answer."""

    def __init__(self) -> None:
        self.since = {1: "monday", 2: "monday"}
        self.mute: set[int] = set()
        self.hellos: list[int] = []
        self.asked = 0
        self.windows = {1: 3, 2: 3}

    def get_nodes(self) -> list[Any]:
        return [
            SimpleNamespace(node_id=i, public_key=bytes([i]), last_activated_at=at)
            for i, at in self.since.items()
        ]

    def get_node_ids(self) -> list[int]:
        return list(self.since)

    def exchange(self, messages: Iterable[Message], **_: Any) -> Iterator[Message]:
        for message in messages:
            node = message.metadata.dst_node_id
            hello = message.metadata.message_type == control.HELLO
            if hello:
                self.hellos.append(node)
            self.asked += not hello
            if node in self.mute:
                continue
            said: Any = pb.EdgeHello(schema=control.SCHEMA, name=f"edge-{node}")
            if not hello:
                said = pb.Progress(
                    schema=control.SCHEMA, run=RUN, edge=f"edge-{node}", window=self.windows[node]
                )
            yield Message(control.control_content(said), reply_to=message)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    made = Tree(cast(Any, FakeGrid()), NameRegistry(tmp_path / "edges.json"), RUN, 0.0, ClientKeys(tmp_path))
    made.refresh()
    assert made.edges() == {"edge-1": 1, "edge-2": 2}
    grid_of(made).hellos.clear()
    return made


def grid_of(tree: Tree) -> FakeGrid:
    return cast(FakeGrid, tree.grid)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that lets seconds pass for the tree."""
    clock = [time.monotonic()]
    monkeypatch.setattr("espalier_server.planning.tree.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def go_on(seconds: float) -> None:
        clock[0] += seconds

    return go_on


def test_who_has_just_been_heard_of_is_not_asked_again(later: Callable[[float], None], tree: Tree) -> None:
    later(ROSTER_AGE - 0.1)
    tree.refresh()
    assert grid_of(tree).hellos == []
    # Edge 2 reports; edge 1, which has no part in the window, may have new clients.
    tree.learn(2, pb.EdgeHello(name="edge-2"))
    later(0.2)
    tree.refresh()
    assert grid_of(tree).hellos == [1]
    tree.refresh(all_edges=True)
    assert grid_of(tree).hellos == [1, 1, 2]


def test_an_edge_that_was_started_again_says_hello_again(tree: Tree) -> None:
    grid_of(tree).since[2] = "tuesday"
    tree.refresh()
    assert grid_of(tree).hellos == [2]
    tree.refresh()
    assert grid_of(tree).hellos == [2]


def test_a_silent_edge_gets_no_part_until_it_answers(later: Callable[[float], None], tree: Tree) -> None:
    grid_of(tree).mute.add(1)
    later(ROSTER_AGE)
    tree.refresh()
    assert tree.edges() == {"edge-2": 2}
    tree.refresh()
    assert tree.edges() == {"edge-2": 2}
    grid_of(tree).mute.clear()
    tree.refresh()
    assert tree.edges() == {"edge-1": 1, "edge-2": 2}
    assert tree.name_of(1) == "edge-1"
    assert tree.name_of(9) == "node 9"


def test_an_edge_that_lost_its_window_is_found(tree: Tree, tmp_path: Path) -> None:
    events = EventLog(tmp_path / "events.jsonl")
    watch = Watch(tree, events, 3)
    with watch:
        grid = grid_of(tree)
        grid.since[2], grid.windows[2] = "tuesday", 0
        watch.poll(tree.since())
        assert watch.lost(2) == ""  # its message may be on its way
        watch.poll(tree.since())
        assert "restarted" in watch.lost(2)
        assert watch.lost(1) == ""
    assert {e["edge"] for e in read_events(tmp_path / "events.jsonl")} == {"edge-1", "edge-2"}


def test_a_restarted_edge_with_the_window_is_waited_for(tree: Tree, tmp_path: Path) -> None:
    watch = Watch(tree, EventLog(tmp_path / "events.jsonl"), 3)
    with watch:
        grid = grid_of(tree)
        grid.since[2], grid.windows[2] = "tuesday", 2
        watch.poll(tree.since())
        grid.windows[2] = 3
        for _ in range(3):
            watch.poll(tree.since())
        assert watch.lost(2) == ""
        # One that is slow to begin, without a restart, is no less waited for.
        grid.windows[1] = 0
        for _ in range(3):
            watch.poll(tree.since())
        assert watch.lost(1) == ""


def test_edges_are_polled_and_at_once_after_a_restart(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("espalier_server.watch.time", SimpleNamespace(monotonic=lambda: clock[0]))
    watch, grid = Watch(tree, EventLog(tmp_path / "events.jsonl"), 3), grid_of(tree)
    asked = []
    with watch:
        for seconds in (2, 2, 2, 2):  # the first at once, the next one six seconds later
            clock[0] += seconds
            watch.tick()
            asked.append(grid.asked)
        assert asked == [2, 2, 2, 4]
        grid.since[2], grid.windows[2] = "tuesday", 0
        clock[0] += 2
        watch.tick()
        watch.tick()
        assert grid.asked == 8
        assert "restarted" in watch.lost(2)
        del grid.since[2]  # away, and not back: its lease will tell
        watch.tick()
        assert grid.asked == 8


@pytest.mark.parametrize(
    ("run", "window", "flower_run", "sent_at", "overtaken"),
    [
        ("r", 3, 77, 20.0, False),
        ("r", 4, 77, 20.0, True),
        ("r", 2, 77, 20.0, False),
        ("other", 4, 77, 20.0, False),
        ("r", 0, 88, 20.0, True),  # submitted again: nobody waits for what its former self had sent
        ("r", 0, 88, 5.0, False),  # the former self's word, late
        ("r", 4, 77, 5.0, False),
    ],
)
def test_an_edge_drops_a_window_the_cloud_skipped(
    run: str, window: int, flower_run: int, sent_at: float, overtaken: bool
) -> None:
    progress = EdgeProgress(run="r", window=3, flower_run=77, sent_at=10.0)
    progress.note_cloud_progress(run, window, flower_run, sent_at)
    assert progress.overtaken.is_set() is overtaken
    idle = EdgeProgress()
    idle.note_cloud_progress(run, window, flower_run, sent_at)
    assert not idle.overtaken.is_set()
