"""Waits until the edges and clients that a run needs have joined."""

from __future__ import annotations

import time
from collections.abc import Callable

from espalier.config.run_settings import RunSettings
from espalier.errors import EspalierError
from espalier_server.planning.tree import Tree

#: Seconds between checks for edges and clients that have not joined yet.
JOIN_INTERVAL = 0.5


def wait_for_members(tree: Tree, settings: RunSettings, cancelled: Callable[[], bool]) -> None:
    """Wait until `min-edges` edges and `min-clients` clients have joined.

    In a reproducible run, wait until all members are connected, each client to all of its edges.

    Parameters
    ----------
    tree : Tree
        The edges and clients of the run.
    settings : RunSettings
        The run's configuration.
    cancelled : callable
        Once it returns True, the function returns without waiting further.

    Raises
    ------
    EspalierError
        Too few joined within `hello-timeout` seconds, or more than a reproducible run expects.
    """
    deadline = time.monotonic() + settings.hello_timeout
    while not cancelled():
        tree.refresh(all_edges=True)
        edges, members = tree.edges(), tree.members()
        missing = _missing(tree, settings) if tree.reproducible else []
        if len(edges) >= settings.min_edges and len(members) >= settings.min_clients and not missing:
            return
        if time.monotonic() > deadline and missing:
            raise EspalierError(
                f"a reproducible run needs all of its members, and {', '.join(missing[:5])} did not join within "
                f"{settings.hello_timeout:g} s; start what is missing and resume the run"
            )
        if time.monotonic() > deadline:
            busy = [f"{edge} serves run {run}" for edge, run in tree.busy_edges().items()]
            raise EspalierError(
                f"{len(edges)} of {settings.min_edges} edges and {len(members)} of "
                f"{settings.min_clients} clients joined within {settings.hello_timeout:g} s"
                + (f"; {'; '.join(busy)}" if busy else "")
                + "; start the missing ones or lower min-edges and min-clients"
            )
        time.sleep(JOIN_INTERVAL)


def _missing(tree: Tree, settings: RunSettings) -> list[str]:
    """Return what a reproducible run still waits for; raises EspalierError if more joined than expected."""
    if tree.frozen_members:
        return tree.absent()
    edges_of, edges = tree.connected_clients(), tree.edges()
    for found, expected, what in (
        (len(edges), settings.min_edges, "edges"),
        (len(edges_of), settings.min_clients, "clients"),
    ):
        if found > expected:
            raise EspalierError(
                f"{found} {what} joined, and min-{what}={expected}; a reproducible run needs their exact number"
            )
    expected_edges = {name: max(tree.hello_of(name).homes, 1) for name in edges_of}
    return [
        f"{name} at {expected_edges[name] - len(found)} of its edges"
        for name, found in edges_of.items()
        if len(found) < expected_edges[name]
    ]
