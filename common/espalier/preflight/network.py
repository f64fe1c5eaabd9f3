"""Checks that several tiers share: names, addresses to listen on, and the servers that a node connects to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from espalier.errors import AddressError, EspalierError
from espalier.preflight import machine, tls
from espalier.preflight.findings import Findings
from espalier.processes.ports import check_free
from espalier.security.transport import Address, Security, parse_address

#: Seconds by which two clocks may differ before a warning.
SKEW_SECONDS = 5.0


def parse(text: str, *, listen: bool = False) -> Address | None:
    """Return an address; None where it does not parse, which `check_listen` reports."""
    try:
        return parse_address(text, listen=listen)
    except AddressError:
        return None


def check_node_name(found: Findings, name: str) -> None:
    """Check the name of an edge or client."""
    from espalier.names import check_name

    found.attempt("name", lambda: check_name(name, "--name"))


def check_listen(found: Findings, flag: str, text: str, *, in_use: bool) -> None:
    """Check that a port is free.

    Parameters
    ----------
    in_use : bool
        A running process holds the same state folder; the port may be its own and is not tried.
    """

    def check() -> str:
        check_free(parse_address(text, listen=True), flag)
        return f"{text} is free"

    if in_use and parse(text, listen=True):
        found.ok(flag, f"{text}: not tried, the running process may listen there")
    else:
        found.attempt(flag, check)


def check_metrics(found: Findings, options: dict[str, Any], *, in_use: bool) -> None:
    """Check the address of --metrics-port, where it is given; see `check_listen`."""
    if options["metrics_port"] is not None:
        host = options["metrics_host"]
        text = f"[{host}]:{options['metrics_port']}" if ":" in host else f"{host}:{options['metrics_port']}"
        check_listen(found, "--metrics-port", text, in_use=in_use)


def check_servers(
    found: Findings,
    servers: Sequence[str],
    flag: str,
    state: Path,
    key: Path | None,
    security: Security,
    *,
    free: bool,
) -> None:
    """Check the servers that a node is to connect to: addresses, TLS, and whether they admit the node.

    Parameters
    ----------
    servers : sequence of str
        HOST:PORT of each.
    flag : str
        The option that gave them.
    state : Path
        The node's state folder.
    key : Path or None
        Private node key; by default the one in `state`.
    security : Security
        Certificates of the links.
    free : bool
        No running process holds `state`; otherwise admission is not tried, because a node key serves one process.
    """
    node_key = machine.check_node_key(found, key or state / "node.key", key is not None)
    for text in servers:
        try:
            address = parse_address(text)
            security.client_roots(text)
        except EspalierError as error:
            found.fault(flag, error)
            continue
        if not tls.check_server_link(found, security, address):
            continue
        _compare(found, text, security)
        if node_key is None:
            found.ok(f"admission {text}", "not tried: there is no node key yet")
        elif not free:
            found.ok(f"admission {text}", "not tried: a running process uses the node key")
        else:
            _try_admission(found, text, security, state, node_key)


def _compare(found: Findings, server: str, security: Security) -> None:
    """Compare versions and clocks with a server that reports its own: an edge does, a stock SuperLink does not."""
    from espalier.monitor.health import ask_facts
    from espalier.wire.hello import version_mismatch

    try:
        facts = ask_facts(server, security)
    except EspalierError as error:
        found.fail(
            f"answer {server}", str(error), "check the port, and that both sides use TLS or neither does"
        )
        return
    if facts is None:
        found.ok(f"versions {server}", "not reported; compared when the node connects")
        return
    mismatch = version_mismatch(facts.versions)
    if mismatch:
        said, _, remedy = mismatch.rpartition("; ")
        found.warn(f"versions {server}", said, remedy)
    else:
        found.ok(f"versions {server}", ", ".join(f"{k} {v}" for k, v in sorted(facts.versions.items())))
    said = f"this machine's is {abs(facts.ahead):.1f} s {'ahead of' if facts.ahead > 0 else 'behind'} the server's"
    if abs(facts.ahead) > SKEW_SECONDS:
        found.warn(f"clock {server}", said, "set both clocks, e.g. by NTP")
    else:
        found.ok(f"clock {server}", said)


def _try_admission(found: Findings, server: str, security: Security, state: Path, key: Any) -> None:
    from espalier.flower.admission_probe import try_admission
    from espalier.flower.upstreams import Upstream

    try:
        remembered = json.loads((state / "homes.json").read_text()).get(server)
    except (OSError, ValueError, AttributeError):
        remembered = None
    roots = security.client_roots(server)
    upstream = Upstream(server, root_certificates=roots, insecure=roots is None)
    found.attempt(f"admission {server}", lambda: try_admission(upstream, key, remembered))
