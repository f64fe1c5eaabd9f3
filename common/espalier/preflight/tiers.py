"""The checks of each tier, in the order in which what they look at is needed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from espalier.errors import AddressError, EspalierError
from espalier.preflight import machine, tls
from espalier.preflight.findings import Findings
from espalier.processes.supervise import check_free
from espalier.security.transport import Address, Security, parse_address

#: Seconds by which two clocks may differ before a warning.
SKEW_SECONDS = 5.0


def check_cloud(options: dict[str, Any], security: Security) -> Findings:
    """Check what `espalier cloud` needs."""
    found, state = Findings(), Path(options["state"]).expanduser()
    machine.check_versions(found, ("torch", "torch-pruning", "torchmetrics"))
    free = machine.check_state(found, state)
    machine.check_space(found, "cloud", state)
    for flag in ("listen", "control", "monitor"):
        if options[flag] not in ("", "none"):
            _check_listen(found, f"--{flag}", options[flag], ours=not free)
    _check_metrics(found, options, ours=not free)
    if (address := _parse(options["control"])) and not address.is_loopback and not options["expose_control"]:
        found.fail(
            "--control", f"{address} is open to other machines", "use 127.0.0.1:PORT, or --expose-control"
        )
    if address := _parse(options["listen"], listen=True):
        tls.check_own(found, security, address)
    return found


def check_edge(options: dict[str, Any], security: Security) -> Findings:
    """Check what `espalier edge` needs."""
    found, state = Findings(), Path(options["state"]).expanduser()
    machine.check_versions(found, ())
    _check_name(found, options["name"])
    free = machine.check_state(found, state)
    machine.check_space(found, "edge", state)
    _check_listen(found, "--listen", options["listen"], ours=not free)
    if options["monitor"] not in ("", "none"):
        _check_listen(found, "--monitor", options["monitor"], ours=not free)
    _check_metrics(found, options, ours=not free)
    if address := _parse(options["listen"], listen=True):
        tls.check_own(found, security, address)
    _check_above(found, [options["cloud"]], "--cloud", state, options["key"], security, free=free)
    return found


def check_client(options: dict[str, Any], security: Security) -> Findings:
    """Check what `espalier client` needs."""
    found, state = Findings(), Path(options["state"]).expanduser()
    machine.check_versions(found, ("torch",))
    _check_name(found, options["name"])
    free = machine.check_state(found, state)
    machine.check_space(found, "client", state)
    machine.check_device(found, options["device"])
    if options["data"]:
        machine.check_data(found, options["data"])
    elif options["user_app"] is None:
        found.fail("data", "--data is missing", "give the data to train on, e.g. --data ./photos")
    _check_metrics(found, options, ours=not free)
    _check_above(found, options["edges"], "--edge", state, options["key"], security, free=free)
    return found


def _parse(text: str, *, listen: bool = False) -> Address | None:
    try:
        return parse_address(text, listen=listen)
    except AddressError:
        return None  # `_check_listen` has told


def _check_name(found: Findings, name: str) -> None:
    from espalier.names import check_name

    found.attempt("name", lambda: check_name(name, "--name"))


def _check_listen(found: Findings, flag: str, text: str, *, ours: bool) -> None:
    """Check that a port is free; one that is in use may be that of the running process on the same state."""

    def check() -> str:
        check_free(parse_address(text, listen=True), flag)
        return f"{text} is free"

    if ours and _parse(text, listen=True):
        found.ok(flag, f"{text}: not tried, the running process may have it")
    else:
        found.attempt(flag, check)


def _check_metrics(found: Findings, options: dict[str, Any], *, ours: bool) -> None:
    if options["metrics_port"] is not None:
        host = options["metrics_host"]
        text = f"[{host}]:{options['metrics_port']}" if ":" in host else f"{host}:{options['metrics_port']}"
        _check_listen(found, "--metrics-port", text, ours=ours)


def _check_above(
    found: Findings,
    servers: Sequence[str],
    flag: str,
    state: Path,
    key: Path | None,
    security: Security,
    *,
    free: bool,
) -> None:
    """Check the servers above: addresses, TLS, and whether they admit this node."""
    node_key = machine.check_node_key(found, key or state / "node.key", key is not None)
    for text in servers:
        try:
            address = parse_address(text)
            security.client_roots(text)
        except EspalierError as error:
            found.fault(flag, error)
            continue
        if not tls.check_above(found, security, address):
            continue
        _compare(found, text, security)
        if node_key is None:
            found.ok(f"admission {text}", "not tried: there is no node key yet")
        elif not free:
            found.ok(f"admission {text}", "not tried: a running process uses the node key")
        else:
            _admission(found, text, security, state, node_key)


def _compare(found: Findings, server: str, security: Security) -> None:
    """Compare versions and clocks with a server that tells its own: an edge does, a stock SuperLink does not."""
    from espalier.monitor.health import ask_facts
    from espalier.wire.hello import version_mismatch

    try:
        facts = ask_facts(server, security)
    except EspalierError as error:
        found.fail(f"answer {server}", str(error), "is it the right port, and TLS on both sides or on none?")
        return
    if facts is None:
        found.ok(f"versions {server}", "it does not tell; compared when it says hello")
        return
    mismatch = version_mismatch(facts.versions)
    if mismatch:
        found.warn(f"versions {server}", *_split(mismatch))
    else:
        found.ok(f"versions {server}", ", ".join(f"{k} {v}" for k, v in sorted(facts.versions.items())))
    said = f"this machine's is {abs(facts.ahead):.1f} s {'ahead of' if facts.ahead > 0 else 'behind'} the server's"
    if abs(facts.ahead) > SKEW_SECONDS:
        found.warn(f"clock {server}", said, "set both clocks, e.g. by NTP")
    else:
        found.ok(f"clock {server}", said)


def _split(text: str) -> tuple[str, str]:
    said, _, mend = text.rpartition("; ")
    return said, mend


def _admission(found: Findings, server: str, security: Security, state: Path, key: Any) -> None:
    from espalier.flower.admission import try_admission
    from espalier.flower.upstreams import Home

    try:
        remembered = json.loads((state / "homes.json").read_text()).get(server)
    except (OSError, ValueError, AttributeError):
        remembered = None
    roots = security.client_roots(server)
    home = Home(server, root_certificates=roots, insecure=roots is None)
    found.attempt(f"admission {server}", lambda: try_admission(home, key, remembered))
