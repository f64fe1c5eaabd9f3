"""A whole tree in one process, tiers unchanged and links missing: what benches and the exactness law run on."""

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
        Numbers of the edges it reaches, from 0.
    more : Mapping
        Further node config, e.g. ``{"level": 0.5}``.
    """

    name: str
    data: str
    edges: tuple[int, ...] = (0,)
    more: Mapping[str, Any] | None = None


class LocalTree:
    """Cloud, edges and clients as objects; the states of clients and edges lie below a folder.

    Parameters
    ----------
    folder : Path
        Where states and runs go.
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
            below = [
                client_node(100 + i, client_app, self._config(c))
                for i, c in enumerate(clients)
                if e in c.edges
            ]
            state = folder / f"edge-{e + 1}"
            state.mkdir(parents=True, exist_ok=True)
            edge = EdgeApp(f"edge-{e + 1}", cast(Any, LocalFleet(below)), state, LocalCloud())
            self.edges.append(below)
            nodes.append(LocalNode(e + 1, f"edge-{e + 1}".encode(), edge))
        self.nodes = nodes

    def _config(self, client: LocalClient) -> dict[str, Any]:
        state = str(self.folder / "clients" / client.name)
        return {"name": client.name, "data": client.data, "state": state, "device": "cpu"} | dict(
            client.more or {}
        )

    def run(self, name: str, settings: Mapping[str, bool | int | float | str]) -> TreeRun:
        """Run a whole run; `settings` are flat keys."""
        config = RunConfig.from_flat({"run-id": name, **settings})
        out = self.folder / "runs" / name
        out.mkdir(parents=True, exist_ok=True)
        run = TreeRun(config, cast(Any, LocalGrid(self.nodes)), out, self.folder / "cloud")
        run.run()
        return run
