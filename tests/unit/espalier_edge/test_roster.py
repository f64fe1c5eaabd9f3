"""Who is below an edge: names owned by keys, bad hellos left out, restarted nodes asked again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from flwr.app import ConfigRecord, Message
from flwr.supercore.task_identity import TaskIdentity

from espalier.errors import StateError, WireError
from espalier.security.name_registry import NameRegistry
from espalier.wire import control
from espalier_edge.roster import Roster
from espalier_proto import espalier_pb2 as pb

TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
REQUEST = ConfigRecord({"run": "r", "histogram-epsilon": 0.0})


class Tree:
    """A fleet and a grid in one: nodes that answer hellos as told."""

    def __init__(self) -> None:
        self.online: dict[int, SimpleNamespace] = {}
        self.hellos: dict[int, pb.ClientHello] = {}
        self.asked: list[int] = []

    def join(self, node: int, key: bytes, hello: pb.ClientHello, since: str = "1") -> None:
        self.online[node] = SimpleNamespace(node_id=node, public_key=key, last_activated_at=since)
        self.hellos[node] = hello

    def nodes(self) -> list[SimpleNamespace]:
        return list(self.online.values())

    def exchange(self, messages: Iterable[Message], **_: Any) -> Iterator[Message]:
        for message in messages:
            node = message.metadata.dst_node_id
            self.asked.append(node)
            yield Message(control.control_content(self.hellos[node]), reply_to=message)


def hello(name: str, counts: tuple[float, ...] = (2, 3)) -> pb.ClientHello:
    return pb.ClientHello(
        schema=control.SCHEMA,
        name=name,
        samples=5,
        histogram=pb.LabelHistogram(counts=counts),
        classes=["cat", "dog"],
        image_shape=[1, 8, 8],
    )


@pytest.fixture
def tree() -> Tree:
    return Tree()


@pytest.fixture
def roster(tree: Tree, tmp_path: Path) -> Roster:
    return Roster(cast(Any, tree), NameRegistry(tmp_path / "names.json"))


def test_clients_are_asked_once(tree: Tree, roster: Roster) -> None:
    tree.join(1, b"k1", hello("cam-1"))
    tree.join(2, b"k2", hello("cam-2"))
    roster.refresh(cast(Any, tree), REQUEST, 1.0)
    roster.refresh(cast(Any, tree), REQUEST, 1.0)
    assert tree.asked == [1, 2]
    assert list(roster.clients()) == ["cam-1", "cam-2"]
    assert roster.name_of(2) == "cam-2"
    del tree.online[1]
    assert list(roster.clients()) == ["cam-2"]


def test_a_node_that_was_started_again_is_asked_again(tree: Tree, roster: Roster) -> None:
    tree.join(1, b"k1", hello("cam-1", (5, 5)))
    roster.refresh(cast(Any, tree), REQUEST, 1.0)
    assert roster.clients() == {}
    [fault] = roster.faults
    assert (fault.node, fault.kind) == ("cam-1", "refused")
    assert "10 counts for 5 samples" in fault.detail
    roster.refresh(cast(Any, tree), REQUEST, 1.0)
    assert tree.asked == [1]  # refused once is enough
    tree.join(1, b"k1", hello("cam-1"), since="2")
    roster.refresh(cast(Any, tree), REQUEST, 1.0)
    assert tree.asked == [1, 1]
    assert list(roster.clients()) == ["cam-1"]


def test_a_name_belongs_to_its_key(tree: Tree, roster: Roster, tmp_path: Path) -> None:
    tree.join(1, b"k1", hello("cam-1"))
    roster.refresh(cast(Any, tree), REQUEST, 1.0)
    tree.join(2, b"k2", hello("cam-1"))
    roster.refresh(cast(Any, tree), REQUEST, 1.0)
    assert roster.clients()["cam-1"].node_id == 1
    [fault] = roster.faults
    assert "another node key owns this name" in fault.detail
    # Also after a restart of the edge, and the key cannot take a second name.
    again = NameRegistry(tmp_path / "names.json")
    again.claim("cam-1", b"k1")
    with pytest.raises(WireError, match="already goes by the name 'cam-1'"):
        again.claim("cam-9", b"k1")


def test_a_client_that_comes_back_as_another_node_counts_once(tree: Tree, roster: Roster) -> None:
    tree.join(1, b"k1", hello("cam-1"))
    roster.refresh(cast(Any, tree), REQUEST, 1.0)
    tree.join(7, b"k1", hello("cam-1"))
    roster.refresh(cast(Any, tree), REQUEST, 1.0)
    assert {n: k.node_id for n, k in roster.clients().items()} == {"cam-1": 7}


def test_a_client_of_another_version_is_named_once(tree: Tree, roster: Roster) -> None:
    old = hello("cam-1")
    old.facts.versions.update({"espalier": "0.0.1", "flwr": "1.39.9"})
    tree.join(1, b"k1", old)
    roster.refresh(cast(Any, tree), REQUEST, 1.0)
    tree.join(1, b"k1", old, since="2")  # it connects again within the run
    roster.refresh(cast(Any, tree), REQUEST, 1.0)
    assert tree.asked == [1, 1]
    assert list(roster.clients()) == ["cam-1"]
    [fault] = roster.faults
    assert (fault.tier, fault.node, fault.kind) == ("edge", "cam-1", "version")
    assert fault.detail.startswith("espalier 0.0.1 there, ")
    assert fault.detail.endswith(" here; install one version on both")


def test_a_damaged_registry_says_so(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text("{")
    with pytest.raises(StateError, match=r"names\.json is damaged"):
        NameRegistry(tmp_path / "names.json")


@pytest.mark.parametrize("name", ["", "../x", "a b", "-a", "a" * 65])
def test_a_name_that_would_be_no_file_name_is_refused(tree: Tree, roster: Roster, name: str) -> None:
    tree.join(1, b"k1", hello(name))
    roster.refresh(cast(Any, tree), REQUEST, 1.0)
    assert roster.clients() == {}
    assert len(roster.faults) == 1


def test_the_edge_measures_links_itself(tree: Tree, roster: Roster) -> None:
    """A client that calls its link slow, to be given another edge, is not believed."""
    boast = hello("cam-1")
    boast.link_seconds, boast.level = 1000.0, 0.5
    tree.join(1, b"k1", boast)
    roster.refresh(cast(Any, tree), REQUEST, 1.0)
    known = roster.clients()["cam-1"].hello
    assert 0 < known.link_seconds < 100
    assert known.level == 0.5


def test_a_level_that_is_no_share_is_refused(tree: Tree, roster: Roster) -> None:
    bad = hello("cam-1")
    bad.level = 2.0
    tree.join(1, b"k1", bad)
    tree.join(2, b"k2", hello("cam-2"))
    roster.refresh(cast(Any, tree), REQUEST, 1.0)
    assert list(roster.clients()) == ["cam-2"]
    [fault] = roster.faults
    assert (fault.node, fault.kind) == ("cam-1", "refused")
    assert "the level 2" in fault.detail
