"""Cost of TLS and signatures in a round at an edge, as a ratio of its seconds to those of a plain round.

Measured with clients that train a network of 9 MB for an epoch, and with clients that return 10 MB without training,
so that the links dominate. ``python -m bench.security``.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.edge_rounds import Round, Trained, random_weights, setup, trained_network, unet_layout
from bench.report import Outcome, Row, Target, run

if TYPE_CHECKING:
    from espalier.wire.payload import Weights

ABOUT = "What TLS and signatures add to an edge round of two clients"
CLIENTS = 2
BIG, SMALL = 10_000_000, 100_000  # bytes
PLAIN, TLS, SIGNED = "plain", "TLS", "TLS, signatures"
TRAINING, EXCHANGE = "an epoch of training", "nothing"


@dataclass(frozen=True)
class Case:
    """What clients do in a round (train, or only return the payload), and the number of rounds per setup."""

    does: str
    weights: Callable[[int], Weights]
    warm: int
    count: int
    trained: Trained | None = None


def cases(tiny: bool) -> list[Case]:
    """Return the two cases; mobilenet-v2 is the preset whose network is closest to 10 MB."""
    layout = unet_layout(SMALL if tiny else BIG)
    network = (
        trained_network("cnn", **{"local-steps": 1})
        if tiny
        else trained_network("mobilenet-v2", optimizer="sgd")
    )
    training = Case(TRAINING, lambda number: network.weights, 1 if tiny else 2, 2 if tiny else 12, network)
    bare = Case(EXCHANGE, lambda number: random_weights(layout, number), 1 if tiny else 3, 5 if tiny else 60)
    return [training, bare]


def measure(tiny: bool) -> Outcome:
    """Time rounds of the setups alternately, so that other load on the machine affects all of them."""
    outcome = Outcome()
    for case in cases(tiny):
        rows = compare(timed(case), case)
        outcome.rows += rows
        name = f"round with TLS and signatures over a plain one, clients do {case.does}: ratio"
        outcome.targets.append(Target.at_most(name, float(rows[-1]["plain_x"] or 0), 1.1))
    outcome.notes = [
        "paired_x is the median over rounds of the ratio to the plain round of the same turn",
        "cpu_s is the processor time of a round, server and clients together; other load affects it less than seconds",
    ]
    return outcome


def timed(case: Case) -> dict[str, list[Round]]:
    """Return the rounds of every setup."""
    rounds: dict[str, list[Round]] = {PLAIN: [], TLS: [], SIGNED: []}
    with tempfile.TemporaryDirectory(prefix="security-") as name, ExitStack() as stack:
        setups = {
            kind: stack.enter_context(
                setup(
                    Path(name) / f"setup-{i}",
                    CLIENTS,
                    tls=kind != PLAIN,
                    signs=kind == SIGNED,
                    trained=case.trained,
                )
            )
            for i, kind in enumerate(rounds)
        }
        for number in range(case.warm + case.count):
            for turn, (kind, edge) in enumerate(setups.items()):
                measured = edge.round(number, case.weights(number * len(setups) + turn))
                if number >= case.warm:
                    rounds[kind].append(measured)
    return rounds


def compare(rounds: dict[str, list[Round]], case: Case) -> list[Row]:
    """Return a row per setup, with its ratios to the plain setup."""
    plain = [one.seconds for one in rounds[PLAIN]]
    work = {kind: sum(one.server + one.clients for one in found) for kind, found in rounds.items()}
    rows: list[Row] = []
    for kind, found in rounds.items():
        seconds = [one.seconds for one in found]
        median = statistics.median(seconds)
        rows.append(
            {
                "setup": kind,
                "clients do": case.does,
                "bytes": case.weights(0).layout.nbytes,
                "rounds": len(found),
                "median_s": median,
                "min_s": min(seconds),
                "max_s": max(seconds),
                "plain_x": median / statistics.median(plain),
                "cpu_s": work[kind] / len(found),
                "cpu_x": work[kind] / work[PLAIN],
                "paired_x": statistics.median(b / a for a, b in zip(plain, seconds, strict=True)),
            }
        )
    return rows


if __name__ == "__main__":
    sys.exit(run("security", measure, ABOUT))
