"""Measures what TLS and signatures cost an edge round: the same rounds plain, over TLS, and signed as well."""

from __future__ import annotations

import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from bench.report import Outcome, Target, run
from bench.rounds import random_weights, setup, unet_layout

ABOUT = "Wall time of an edge round of two clients that do not train"
CLIENTS = 2
BIG, SMALL = 10_000_000, 100_000  # bytes
PLAIN, TLS, SIGNED = "plain", "TLS", "TLS, signatures"


def measure(tiny: bool) -> Outcome:
    """Time rounds of the setups in turn, so that whatever else the machine does falls on all of them."""
    size, warm, count = (SMALL, 1, 5) if tiny else (BIG, 3, 25)
    layout = unet_layout(size)
    seconds: dict[str, list[float]] = {PLAIN: [], TLS: [], SIGNED: []}
    worked = dict.fromkeys(seconds, 0.0)
    with tempfile.TemporaryDirectory(prefix="security-") as name, ExitStack() as stack:
        setups = {
            kind: stack.enter_context(
                setup(Path(name) / f"setup-{i}", CLIENTS, tls=kind != PLAIN, signs=kind == SIGNED)
            )
            for i, kind in enumerate(seconds)
        }
        for number in range(warm + count):
            for kind, one in setups.items():
                took = one.round(
                    number, random_weights(layout, number * len(setups) + list(setups).index(kind))
                )
                if number >= warm:
                    seconds[kind].append(took.seconds)
                    worked[kind] += took.server + took.clients
    plain = statistics.median(seconds[PLAIN])
    outcome = Outcome()
    for kind, found in seconds.items():
        outcome.rows.append(
            {
                "setup": kind,
                "clients": CLIENTS,
                "bytes": size,
                "rounds": len(found),
                "median_s": statistics.median(found),
                "min_s": min(found),
                "max_s": max(found),
                "plain_x": statistics.median(found) / plain,
                "cpu_s": worked[kind] / len(found),
                "cpu_x": worked[kind] / worked[PLAIN],
                "paired_x": statistics.median(b / a for a, b in zip(seconds[PLAIN], found, strict=True)),
            }
        )
    secured = statistics.median(seconds[SIGNED]) / plain
    outcome.targets = [Target.at_most("round with TLS and signatures over a plain one, ratio", secured, 1.1)]
    outcome.notes = [
        "paired_x is the median over rounds of the ratio to the plain round of the same turn",
        "cpu_s is the processor time of a round, server and clients together: it hangs less on what else runs",
    ]
    return outcome


if __name__ == "__main__":
    sys.exit(run("security", measure, ABOUT))
