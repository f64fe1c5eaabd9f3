"""Several clients in one process, for testbeds: one node each, which share imports, data and connections."""

from __future__ import annotations

import logging
import queue
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from espalier.data.spec import parse_spec, sharing_sources
from espalier.diffusers_shim import leave_out_optional
from espalier.errors import ConfigError
from espalier.flower.memory import retain_freed_blocks
from espalier.flower.node_resources import NodeResources
from espalier.flower.resident import ResidentNode, Upstream
from espalier.flower.upstream_session import App
from espalier.monitor.node_log import event_logger
from espalier.monitor.node_status import TOUCH_SECONDS, NodeStatus
from espalier.names import is_name
from espalier.processes.signals import stop_on_signals
from espalier.security.transport import Security
from espalier.wire import control
from espalier_client.service import open_device

log = logging.getLogger("espalier.client")

#: Channels to a server that share a connection; a node has two.
CHANNELS_PER_CONNECTION = 100
#: Number of nodes that leave their servers in parallel.
PARALLEL_LEAVES = 32
#: Message types that are answered while another replica trains, as separate processes would.
EXEMPT_TYPES = frozenset({control.HELLO, control.REFUSAL})


@dataclass(frozen=True)
class Replica:
    """One of the clients: its name, data SPEC and state folder."""

    name: str
    data: str
    state: Path


def plan_replicas(name: str, data: str, state: Path, count: int) -> list[Replica]:
    """Return the clients with their names, shares of the data and state folders.

    Parameters
    ----------
    name : str
        Client i is NAME-i, with at least three digits.
    data : str
        Data SPEC. For ``SOURCE:I/N:SCHEME`` client i gets share I + i; without ``I/N`` the data set is split among
        the clients.
    state : Path
        Client i's folder is its subfolder NAME-i.
    count : int
        Number of clients.

    Raises
    ------
    ConfigError
        A name would be too long, or there are fewer shares than clients.
    DataError
        The SPEC does not parse.
    """
    digits = max(3, len(str(count - 1)))
    names = [f"{name}-{i:0{digits}d}" for i in range(count)]
    if not is_name(names[-1]):
        raise ConfigError(
            f"--name {name!r} is not a valid name for {count} clients ({names[-1]}); give a shorter one"
        )
    spec = parse_spec(data)
    shares, first = spec.clients, spec.index
    if shares == 1:
        shares, first = count, 0
    if first + count > shares:
        raise ConfigError(
            f"--data {data!r}: {count} clients from share {first} need {first + count} shares, not {shares}; "
            f"give e.g. {spec.source}:0/{count}"
        )
    marker = f":{spec.index}/{spec.clients}"
    end = data[data.rindex(marker) + len(marker) :] if marker in data else ""
    return [
        Replica(name, f"{spec.source}:{first + i}/{shares}{end}", state / name)
        for i, name in enumerate(names)
    ]


class Replicas:
    """A context manager that starts the nodes of the replicas and closes them.

    Parameters
    ----------
    nodes : sequence of ResidentNode
        The nodes, constructed with `resources`.
    resources : NodeResources
        The resources that they share.
    """

    def __init__(self, nodes: Sequence[ResidentNode], resources: NodeResources) -> None:
        self._nodes, self._resources = nodes, resources

    def __enter__(self) -> Replicas:
        for node in self._nodes:
            node.start()
        return self

    def __exit__(self, *_: object) -> None:
        with ThreadPoolExecutor(PARALLEL_LEAVES) as pool:
            list(pool.map(ResidentNode.close, self._nodes))
        self._resources.stop()


def run_replicas(
    replicas: Sequence[Replica],
    edges: Sequence[str],
    device: str,
    node_config: Mapping[str, bool | int | float | str],
    security: Security,
    threads: int | None = None,
) -> None:
    """Run clients until SIGTERM or Ctrl-C; one of them trains at a time.

    Parameters
    ----------
    replicas : sequence of Replica
        The clients.
    edges : sequence of str
        HOST:PORT of every edge that they connect to.
    device : str
        "auto", "cpu", "cuda" or "cuda:N".
    node_config : mapping
        Additional entries of every node config.
    security : Security
        Certificates of the links.
    threads : int, optional
        CPU threads to train with; by default torch's own choice.

    Raises
    ------
    EspalierError
        If the data, an address or a state folder cannot be used.
    """
    import torch

    from espalier_client.app import app

    retain_freed_blocks()
    leave_out_optional()
    if threads:
        torch.set_num_threads(threads)
    roots = {edge: security.client_roots(edge) for edge in edges}
    upstreams = [Upstream(e, root_certificates=r, insecure=r is None) for e, r in roots.items()]
    statuses: list[NodeStatus] = []

    def node_of(replica: Replica, app: App, resources: NodeResources) -> ResidentNode:
        own: dict[str, bool | int | float | str] = {"name": replica.name, "data": replica.data}
        own |= {"device": device, "state": str(replica.state), "homes": len(upstreams)}
        own["key"] = str(replica.state / "node.key")
        config = own | dict(node_config)
        open_device(config)
        admit = f"espalier clients add {replica.name} {replica.state / 'node.pub'} --state DIR"
        log_event = event_logger(log.getChild(replica.name), admit)
        statuses.append(NodeStatus(replica.state, list(edges), log_event, own_thread=False))
        return ResidentNode(
            app, upstreams, replica.state, node_config=config, resources=resources, on_event=statuses[-1]
        )

    # Not an Event: a signal handler that runs while this thread holds the Event's internal lock would deadlock.
    stop_requested: queue.SimpleQueue[None] = queue.SimpleQueue()
    stop_on_signals(lambda: stop_requested.put(None))
    resources = NodeResources(CHANNELS_PER_CONNECTION, exclusive=True, exempt=EXEMPT_TYPES)
    with sharing_sources():
        nodes = [node_of(replica, app, resources) for replica in replicas]
        log.info("%d clients, %s to %s", len(nodes), replicas[0].name, replicas[-1].name)
        with ExitStack() as stack:
            for status in statuses:
                stack.enter_context(status)
            stack.enter_context(Replicas(nodes, resources))
            ticks = 0
            while True:
                with suppress(queue.Empty):
                    stop_requested.get(timeout=1.0)
                    break
                ticks += 1
                if ticks % TOUCH_SECONDS == 0:
                    for status in statuses:
                        status.touch()
