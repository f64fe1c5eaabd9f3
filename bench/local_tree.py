"""A tree in one process: the code of all tiers without the network, for benches and tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from bench.local_grid import LocalCloud, LocalFleet, LocalGrid, LocalNode, client_node
from espalier.methods.run_config import RunConfig
from espalier_client.app import app as client_app
from espalier_edge.app import EdgeApp
from espalier_server.run import TreeRun


@dataclass(frozen=True)
class LocalClient:
    """A client of a local tree.

    Attributes
    ----------
    name : str
        Its name.
    data : str
        Its data SPEC.
    edges : tuple[int, ...]
        Indices of the edges that it is connected to, from 0.
    node_config : Mapping
        Additional node config, e.g. ``{"level": 0.5}``.
    """

    name: str
    data: str
    edges: tuple[int, ...] = (0,)
    node_config: Mapping[str, Any] | None = None


class LocalTree:
    """Cloud, edges and clients as objects in this process, with their state folders below one folder.

    Parameters
    ----------
    folder : Path
        Folder for state and runs.
    clients : sequence of LocalClient
        The clients.
    edges : int
        Number of edges.
    """

    def __init__(self, folder: Path, clients: Sequence[LocalClient], edges: int = 2) -> None:
        self.folder = folder
        self.clients = {c.name: c for c in clients}
        self.edges = []
        nodes = []
        for e in range(edges):
            members = [
                client_node(100 + i, client_app, self._config(c))
                for i, c in enumerate(clients)
                if e in c.edges
            ]
            state = folder / f"edge-{e + 1}"
            state.mkdir(parents=True, exist_ok=True)
            edge = EdgeApp(f"edge-{e + 1}", cast(Any, LocalFleet(members)), state, LocalCloud())
            self.edges.append(members)
            nodes.append(LocalNode(e + 1, f"edge-{e + 1}".encode(), edge))
        self.nodes = nodes

    def _config(self, client: LocalClient) -> dict[str, Any]:
        state = str(self.folder / "clients" / client.name)
        return {"name": client.name, "data": client.data, "state": state, "device": "cpu"} | dict(
            client.node_config or {}
        )

    def run(self, name: str, settings: Mapping[str, bool | int | float | str]) -> TreeRun:
        """Run a run to its end; `settings` are flat keys, e.g. ``{"rounds": 3}``."""
        config = RunConfig.from_flat({"run-id": name, **settings})
        out = self.folder / "runs" / name
        out.mkdir(parents=True, exist_ok=True)
        run = TreeRun(config, cast(Any, LocalGrid(self.nodes)), out, self.folder / "cloud")
        run.run()
        return run
