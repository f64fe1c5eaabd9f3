"""What `espalier preflight cloud` checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from espalier.preflight import machine, network, tls
from espalier.preflight.findings import Findings
from espalier.preflight.machine import GB, Needs
from espalier.security.transport import Security

NEEDS = Needs(disk=0.5 * GB, memory=1.0 * GB, comfortable_disk=5.0 * GB, comfortable_memory=3.0 * GB)


def check_cloud(options: dict[str, Any], security: Security) -> Findings:
    """Check what `espalier cloud` needs."""
    found, state = Findings(), Path(options["state"]).expanduser()
    machine.check_versions(found, "cloud", ("torch", "torch-pruning", "torchmetrics"))
    free = machine.check_state(found, state)
    machine.check_space(found, NEEDS, state)
    for flag in ("listen", "control", "monitor"):
        if options[flag] not in ("", "none"):
            network.check_listen(found, f"--{flag}", options[flag], in_use=not free)
    network.check_metrics(found, options, in_use=not free)
    control = network.parse(options["control"])
    if control and not control.is_loopback and not options["expose_control"]:
        found.fail(
            "--control", f"{control} is open to other machines", "use 127.0.0.1:PORT, or --expose-control"
        )
    if address := network.parse(options["listen"], listen=True):
        tls.check_own(found, security, address)
    return found
