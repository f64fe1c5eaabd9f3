"""The resident client process: a Flower node with our ClientApp, or with a user's own."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from flwr.clientapp import ClientApp

from espalier.diffusers_shim import leave_out_optional
from espalier.errors import ConfigError
from espalier.flower.memory import retain_freed_blocks
from espalier.flower.resident import ResidentNode, Upstream
from espalier.monitor.node_log import event_logger
from espalier.monitor.node_status import NodeStatus
from espalier.names import is_name
from espalier.processes.signals import stop_on_signals
from espalier.security.transport import Address, Security

log = logging.getLogger("espalier.client")


def run_client(
    name: str,
    edges: list[str],
    data: str,
    device: str,
    state: Path,
    key: Path | None,
    app: str | None,
    node_config: Mapping[str, bool | int | float | str],
    security: Security,
    threads: int | None = None,
    metrics: Address | None = None,
) -> None:
    """Run a client until SIGTERM or Ctrl-C.

    Parameters
    ----------
    name : str
        The client's name.
    edges : list of str
        HOST:PORT of every edge that it connects to.
    data : str
        Data SPEC; opened before the first connection. May be empty with `app`.
    device : str
        "auto", "cpu", "cuda" or "cuda:N".
    state : Path
        Folder for the node key and training state; locked by one process at a time.
    key : Path or None
        Private node key; by default one below `state`.
    app : str or None
        A user's ClientApp as module:object; None for Espalier's.
    node_config : mapping
        Additional entries of the app's node config.
    security : Security
        Certificates of the links.
    threads : int, optional
        CPU threads to train with; by default torch's own choice.
    metrics : Address, optional
        Address to serve Prometheus metrics at.

    Raises
    ------
    EspalierError
        If the name, data, app, an address or the state folder cannot be used.
    """
    retain_freed_blocks()
    if not is_name(name):
        raise ConfigError(f"--name {name!r} is not a valid client name; use letters, digits, '.', '-', '_'")
    own_key = key or state / "node.key"
    own: dict[str, bool | int | float | str] = {"name": name, "data": data, "device": device}
    own |= {"state": str(state), "key": str(own_key), "homes": len(set(edges))}
    config = own | dict(node_config)
    roots = {edge: security.client_roots(edge) for edge in edges}
    upstreams = [Upstream(e, root_certificates=r, insecure=r is None) for e, r in roots.items()]
    client_app = load_app(app) if app else own_app(config, threads)
    public = (key or state / "node.key").with_suffix(".pub")
    admit = f"espalier clients add {name} {public} --state DIR"
    status = NodeStatus(state, edges, event_logger(log, admit))
    node = ResidentNode(client_app, upstreams, state, node_config=config, key=key, on_event=status)
    stop_on_signals(node.stop)
    log.info("client %s for %s", name, ", ".join(edges))
    with status, ExitStack() as stack:
        if metrics is not None:
            from espalier.monitor.metrics import serve_metrics
            from espalier_client.metrics import NodeCollector

            stack.callback(serve_metrics(metrics, NodeCollector(status)))
        node.run()


def own_app(config: Mapping[str, bool | int | float | str], threads: int | None) -> ClientApp:
    """Return Espalier's ClientApp, after opening the data."""
    import torch

    from espalier_client.app import app  # imports torch, which a user's app may not need

    leave_out_optional()
    if threads:
        torch.set_num_threads(threads)
    open_device(config)
    return app


def open_device(config: Mapping[str, bool | int | float | str]) -> None:
    """Open a device's data and measure its speed, so that errors occur at the start and not in a round."""
    from espalier_client.device import Device
    from espalier_client.speed import measured_speed

    device = Device.from_node_config(config)
    log.info("%d images, labels %s", len(device.images), device.labels.astype(int).tolist())
    # Measured now, as the edge measures the round trip of the first hello.
    log.info("%.1f x 1e9 multiply-adds per second", measured_speed(device.torch_device))


def load_app(reference: str) -> ClientApp:
    """Import a user's ClientApp, given as module:object, from the working directory or the environment.

    Raises
    ------
    ConfigError
        If it cannot be imported or is not a ClientApp.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"--app {reference!r} is not of the form module:object, e.g. myapp.client_app:app")
    # First in the path, so that the app's modules take precedence over installed ones of the same names.
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise ConfigError(
            f"--app {reference!r} cannot be imported: {error}; run from its folder or install it"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"--app {reference!r}: the module has no {attribute!r}") from error
    if not isinstance(found, ClientApp):
        raise ConfigError(f"--app {reference!r} is a {type(found).__name__}, not a flwr ClientApp")
    return found
