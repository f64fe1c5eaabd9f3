"""What came of a window at the cloud: the edges' reports, and their aggregates merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from espalier.methods.aggregate import NOMINAL, Aggregate
from espalier.wire.sections import Layouts, Payload
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


class CentralAggregate:
    """The edges' aggregates merged, each edge at its own share where the method has one.

    Edges of share 0 count, as their clients weigh, only if every edge's share is 0.

    Parameters
    ----------
    layouts : mapping of SectionId to Layout
        The cloud's tensors.
    newest_only : bool
        Whether an edge counts only if no other one's newest round is newer.
    """

    def __init__(self, layouts: Layouts, newest_only: bool = False) -> None:
        self._layouts, self._newest_only, self._newest = layouts, newest_only, 0
        self._reset()

    def _reset(self) -> None:
        self._main, self._fallback = Aggregate(self._layouts), Aggregate(self._layouts)
        self._shares: dict[str, float] = {}
        self._natural: dict[str, float] = {}

    def absorb(
        self,
        name: str,
        payload: Payload,
        scalars: Mapping[str, float],
        share: float | None,
        newest: int = 0,
    ) -> None:
        """Merge one edge's aggregate, whose newest round that counted is `newest`.

        Raises
        ------
        ValueError
            Like `Aggregate.absorb`.
        """
        if self._newest_only and newest != self._newest:
            if newest < self._newest:
                return
            Aggregate(self._layouts).absorb(payload, scalars)  # a refused one must not undo what is merged
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

    def result(self) -> tuple[Aggregate, dict[str, float]]:
        """Return the merged aggregate, and each edge's share of its means."""
        counted = any(self._shares.values())
        aggregate, shares = (self._main, self._shares) if counted else (self._fallback, self._natural)
        total = sum(shares.values())
        return (aggregate if total else self._main), {n: s / total for n, s in shares.items() if s}
