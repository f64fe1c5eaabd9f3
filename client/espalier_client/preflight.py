"""What `espalier preflight client` checks, the device and the data included."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from espalier.errors import EspalierError
from espalier.preflight import machine, network
from espalier.preflight.findings import Findings
from espalier.preflight.machine import GB, Needs
from espalier.security.transport import Security

NEEDS = Needs(disk=0.2 * GB, memory=0.5 * GB, comfortable_disk=1.0 * GB, comfortable_memory=1.5 * GB)
#: Fewer images than this are probably the wrong folder.
FEW_IMAGES = 10


def check_client(options: dict[str, Any], security: Security) -> Findings:
    """Check what `espalier client` needs."""
    found, state = Findings(), Path(options["state"]).expanduser()
    own_app = options["user_app"] is not None
    complete = machine.check_versions(found, "" if own_app else "client", ("torch",))
    network.check_node_name(found, options["name"])
    free = machine.check_state(found, state)
    machine.check_space(found, NEEDS, state)
    if complete and not own_app:
        check_device(found, options["device"])
    if options["data"]:
        check_data(found, options["data"])
    elif not own_app:
        found.fail("data", "--data is missing", "give the data to train on, e.g. --data ./photos")
    network.check_metrics(found, options, in_use=not free)
    network.check_servers(found, options["edges"], "--edge", state, options["key"], security, free=free)
    return found


def check_device(found: Findings, device: str) -> None:
    """Check that the device to train on exists."""
    from espalier.training.device import resolve_device

    found.attempt("device", lambda: f"{device}: trains on {resolve_device(device)}, {os.cpu_count()} cores")


def check_data(found: Findings, spec: str) -> None:
    """Open the client's data, read one image and count the images."""
    import numpy as np

    from espalier.data.spec import open_data

    try:
        images = open_data(spec)
        first = images.fetch(np.arange(1)) if len(images) else None
    except EspalierError as error:
        found.fault("data", error)
        return
    if first is None:
        found.fail("data", f"{spec} holds no image", "give another --data")
        return
    held = int((np.bincount(images.labels, minlength=len(images.classes)) > 0).sum())
    shape = "x".join(map(str, images.shape))
    said = f"{len(images)} images of {shape} in {held} of {len(images.classes)} classes"
    if len(images) < FEW_IMAGES:
        found.warn("data", said, "few images: is it the right folder?")
    else:
        found.ok("data", said)
