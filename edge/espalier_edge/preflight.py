"""What `espalier preflight edge` checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from espalier.preflight import machine, network, tls
from espalier.preflight.findings import Findings
from espalier.preflight.machine import GB, Needs
from espalier.security.transport import Security

NEEDS = Needs(disk=0.1 * GB, memory=0.25 * GB, comfortable_disk=1.0 * GB, comfortable_memory=1.0 * GB)


def check_edge(options: dict[str, Any], security: Security) -> Findings:
    """Check what `espalier edge` needs."""
    found, state = Findings(), Path(options["state"]).expanduser()
    machine.check_versions(found)
    network.check_node_name(found, options["name"])
    free = machine.check_state(found, state)
    machine.check_space(found, NEEDS, state)
    network.check_listen(found, "--listen", options["listen"], in_use=not free)
    if options["monitor"] not in ("", "none"):
        network.check_listen(found, "--monitor", options["monitor"], in_use=not free)
    network.check_metrics(found, options, in_use=not free)
    if address := network.parse(options["listen"], listen=True):
        tls.check_own(found, security, address)
    network.check_servers(found, [options["cloud"]], "--cloud", state, options["key"], security, free=free)
    return found
