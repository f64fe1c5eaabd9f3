"""Hellos: device facts and versions that a node sends, and the checks of a received hello."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping

from espalier import distribution
from espalier.errors import WireError
from espalier.models.presets import classifiers
from espalier_proto import espalier_pb2 as pb

#: Maximum number of classes.
MAX_CLASSES = 100_000
#: Maximum number of samples of a client, chosen so that the sum over many clients fits into every field for it.
MAX_SAMPLES = 10**12


def check_client_hello(hello: pb.ClientHello, sender: str) -> None:
    """Validate a ClientHello.

    Raises
    ------
    WireError
        If the histogram does not have one count per class, a count is negative or not finite, the image shape is not
        (C, H, W), there is no sample, the level is outside [0, 1], the model is not a known classifier, or the speed
        or the link's round-trip time is negative or not finite.
    """
    classes = len(hello.classes)
    if not 0 < classes <= MAX_CLASSES:
        raise WireError(sender, f"{classes} classes")
    counts = hello.histogram.counts
    if len(counts) != classes:
        raise WireError(sender, f"a label histogram of {len(counts)} counts for {classes} classes")
    if not all(math.isfinite(c) and c >= 0 for c in counts):
        raise WireError(sender, "a label histogram with a negative or infinite count")
    if not math.isfinite(sum(counts)):
        raise WireError(sender, "a label histogram whose counts cannot be added up")
    if hello.samples == 0:
        raise WireError(sender, "no training sample: give the client data with --data")
    if hello.samples > MAX_SAMPLES:
        raise WireError(sender, f"{hello.samples} samples, more than {MAX_SAMPLES}")
    if not hello.histogram.noisy and round(sum(counts)) != hello.samples:
        raise WireError(sender, f"a label histogram of {sum(counts):g} counts for {hello.samples} samples")
    shape = hello.image_shape
    if len(shape) != 3 or not all(0 < n <= 4096 for n in shape):
        raise WireError(sender, f"the image shape {list(shape)}, expected channels, height and width")
    if not 0 <= hello.level <= 1:  # NaN fails here, too
        raise WireError(sender, f"the level {hello.level:g}, expected a share in (0, 1], or 0 for none")
    if hello.model and hello.model not in classifiers():
        raise WireError(sender, f"the model {hello.model!r}, which is not a classifier of this version")
    if not 0 <= hello.facts.speed < math.inf:
        raise WireError(sender, f"the speed {hello.facts.speed:g}, expected a finite number, not negative")
    if not 0 <= hello.link_seconds < math.inf:
        raise WireError(sender, f"a link of {hello.link_seconds:g} s, expected a finite number, not negative")


def device_facts(device: str) -> pb.DeviceFacts:
    """Describe this machine: device, cores, memory in bytes, and the versions of `own_versions`."""
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return pb.DeviceFacts(
        device=device, cores=os.cpu_count() or 1, memory_bytes=pages * page, versions=own_versions()
    )


@functools.cache  # each version is read from a file, and they are compared for every client
def own_versions() -> Mapping[str, str]:
    """Return the installed versions of Espalier, Flower and torch."""
    return distribution.versions("flwr", "torch")


def version_mismatch(theirs: Mapping[str, str], ours: Mapping[str, str] | None = None) -> str:
    """Return a warning if the versions of a sender and of this process differ, else "".

    The major and minor versions of Espalier and Flower are compared. A mismatch is not an error: incompatible messages
    are rejected by their schema version (`control.decode`).

    Parameters
    ----------
    theirs : mapping of str to str
        The versions in the hello; packages that it does not list are not compared.
    ours : mapping of str to str, optional
        By default `own_versions`.
    """
    ours = own_versions() if ours is None else ours
    differing = [
        f"{name} {theirs[name][:32]} there, {ours[name]} here"
        for name in ("espalier", "flwr")
        if name in theirs and theirs[name].split(".")[:2] != ours[name].split(".")[:2]
    ]
    return f"{' and '.join(differing)}; install one version on both" if differing else ""
