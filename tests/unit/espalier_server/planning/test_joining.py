"""Waiting for the edges and clients of a run: what counts as complete, and what the errors name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from espalier.errors import EspalierError
from espalier.methods.run_config import RunConfig
from espalier_proto import espalier_pb2 as pb
from espalier_server.planning import joining
from espalier_server.planning.joining import wait_for_members
from espalier_server.planning.tree import Tree


@dataclass
class FakeTree:
    """A tree to which the links of `arrivals` are added one per refresh."""

    arrivals: list[tuple[str, str]]
    reproducible: bool = False
    homes: int = 1
    busy: dict[str, str] = field(default_factory=dict)
    frozen_members: dict[str, Any] = field(default_factory=dict)
    found: list[tuple[str, str]] = field(default_factory=list)

    def refresh(self, *, all_edges: bool = False) -> None:
        assert all_edges
        self.found += self.arrivals[:1]
        del self.arrivals[:1]

    def edges(self) -> dict[str, int]:
        return {edge: 1 for _, edge in self.found}

    def members(self) -> list[str]:
        return sorted(self.connected_clients())

    def connected_clients(self) -> dict[str, list[str]]:
        return {name: [e for c, e in self.found if c == name] for name, _ in self.found}

    def busy_edges(self) -> dict[str, str]:
        return self.busy

    def hello_of(self, client: str) -> pb.ClientHello:
        return pb.ClientHello(name=client, homes=self.homes)

    def absent(self) -> list[str]:
        return ["c9 at e1"]


def wait(tree: FakeTree, timeout: float = 60.0, **more: Any) -> None:
    settings = {"min-edges": 2, "min-clients": 2, "hello-timeout": timeout, **more}
    wait_for_members(cast(Tree, tree), RunConfig.from_flat(settings), lambda: False)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "JOIN_INTERVAL", 0.0)


def test_it_returns_once_enough_have_joined() -> None:
    tree = FakeTree([("c1", "e1"), ("c2", "e1"), ("c2", "e2"), ("c3", "e2")])
    wait(tree)
    assert tree.arrivals == [("c3", "e2")]


def test_a_cancelled_wait_returns_at_once() -> None:
    settings = RunConfig.from_flat({"min-edges": 2})
    wait_for_members(cast(Tree, FakeTree([])), settings, lambda: True)


def test_after_the_timeout_the_error_names_the_numbers_and_the_busy_edges() -> None:
    tree = FakeTree([("c1", "e1")], busy={"e2": "other"})
    words = r"1 of 2 edges and 1 of 2 clients joined within 0\.05 s; e2 serves run other; start the missing"
    with pytest.raises(EspalierError, match=words):
        wait(tree, 0.05)


def test_a_reproducible_run_needs_every_link_of_its_clients() -> None:
    links = [("c1", "e1"), ("c2", "e1"), ("c2", "e2"), ("c1", "e2")]
    tree = FakeTree(links, reproducible=True, homes=2)
    wait(tree)
    assert tree.arrivals == []
    with pytest.raises(EspalierError, match="all of its members, and c1 at 1 of its edges did not join"):
        wait(FakeTree([("c1", "e1"), ("c2", "e1"), ("c2", "e2")], reproducible=True, homes=2), 0.05)


def test_a_reproducible_run_refuses_more_than_it_expects() -> None:
    tree = FakeTree([("c1", "e1"), ("c2", "e1"), ("c3", "e1")], reproducible=True)
    with pytest.raises(EspalierError, match="3 clients joined, and min-clients=2"):
        wait(tree)


def test_a_resumed_reproducible_run_waits_for_its_fixed_members() -> None:
    links = [("c1", "e1"), ("c2", "e2")]
    tree = FakeTree(links, reproducible=True, frozen_members={"c9": None})
    with pytest.raises(EspalierError, match="c9 at e1 did not join within"):
        wait(tree, 0.05)
