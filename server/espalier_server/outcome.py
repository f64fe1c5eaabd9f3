"""What came of a window at the cloud: the edges' reports, and their tallies merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from espalier.methods.tally import NOMINAL, Tally
from espalier.wire.payload import Layout, Weights
from espalier.wire.traffic import Ledger
from espalier_proto import espalier_pb2 as pb
from espalier_server.contributions import Checked


@dataclass
class WindowOutcome:
    """What the reports of a window said.

    Attributes
    ----------
    reports : dict[str, pb.EdgeReport]
        By edge name; only reports that were accepted.
    rho : dict[str, float]
        Each edge's share in the central aggregation.
    mu : dict[str, float]
        SH score of the labels each edge trained on.
    ledger : Ledger
        Payload bytes of this window.
    faults : list[pb.Fault]
        The edges' faults and the cloud's.
    signatures : Checked
        What the clients' signatures came to, those under answers to inquiries too.
    """

    reports: dict[str, pb.EdgeReport] = field(default_factory=dict)
    rho: dict[str, float] = field(default_factory=dict)
    mu: dict[str, float] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    faults: list[pb.Fault] = field(default_factory=list)
    signatures: Checked = field(default_factory=Checked)


class CentralTally:
    """The edges' tallies merged, each edge at its own share where the method has one.

    Edges of share 0 count, as their clients weigh, only if every edge's share is 0.

    Parameters
    ----------
    layout : Layout
        The cloud's tensors.
    newest_only : bool
        Whether an edge counts only if no other one's newest round is newer.
    """

    def __init__(self, layout: Layout, newest_only: bool = False) -> None:
        self._layout, self._newest_only, self._newest = layout, newest_only, 0
        self._reset()

    def _reset(self) -> None:
        self._main, self._fallback = Tally(self._layout), Tally(self._layout)
        self._shares: dict[str, float] = {}
        self._natural: dict[str, float] = {}

    def absorb(
        self,
        name: str,
        payload: Weights,
        scalars: Mapping[str, float],
        share: float | None,
        newest: int = 0,
    ) -> None:
        """Merge one edge's tally, whose newest round that counted is `newest`.

        Raises
        ------
        ValueError
            Like `Tally.absorb`.
        """
        if self._newest_only and newest != self._newest:
            if newest < self._newest:
                return
            Tally(self._layout).absorb(payload, scalars)  # unsound ones must not undo what is merged
            self._newest = newest
            self._reset()
        nominal = scalars.get(NOMINAL, 0.0)
        if share is None or nominal == 0:
            self._main.absorb(payload, scalars)
            self._shares[name] = nominal
        elif share > 0:
            self._main.absorb(payload, scalars, share / nominal)
            self._shares[name] = share
        elif not any(self._shares.values()):
            self._fallback.absorb(payload, scalars)
            self._natural[name] = nominal

    def result(self) -> tuple[Tally, dict[str, float]]:
        """Return the merged tally, and each edge's share of its means."""
        counted = any(self._shares.values())
        tally, shares = (self._main, self._shares) if counted else (self._fallback, self._natural)
        total = sum(shares.values())
        return (tally if total else self._main), {n: s / total for n, s in shares.items() if s}
