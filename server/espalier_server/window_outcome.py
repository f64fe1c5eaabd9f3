"""The outcome of a window at the cloud: the edges' reports and the merge of their aggregates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from espalier.methods.aggregate import NOMINAL, Aggregate
from espalier.wire.sections import Layouts, Payload
from espalier.wire.traffic import Ledger
from espalier_proto import espalier_pb2 as pb
from espalier_server.contributions import SignatureCounts


@dataclass
class WindowOutcome:
    """The results of a window, from the reports of the edges.

    Attributes
    ----------
    reports : dict[str, pb.EdgeReport]
        Accepted reports by edge name.
    rho : dict[str, float]
        Each edge's share in the central aggregation.
    mu : dict[str, float]
        Homogeneity score of the labels that each edge trained on.
    ledger : Ledger
        Payload bytes of this window.
    faults : list[pb.Fault]
        The edges' faults and the cloud's.
    signatures : SignatureCounts
        The clients' signatures, including those of answers to inquiries.
    """

    reports: dict[str, pb.EdgeReport] = field(default_factory=dict)
    rho: dict[str, float] = field(default_factory=dict)
    mu: dict[str, float] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    faults: list[pb.Fault] = field(default_factory=list)
    signatures: SignatureCounts = field(default_factory=SignatureCounts)


class CentralAggregate:
    """The merge of the edges' aggregates, weighted by the shares that the method gives the edges, if it does.

    Edges with a share of 0 count only if all shares are 0; they are then weighted by their clients' weights.

    Parameters
    ----------
    layouts : mapping of SectionId to Layout
        Layouts of the cloud's sections.
    newest_only : bool
        Whether only the edges with the newest round count.
    """

    def __init__(self, layouts: Layouts, newest_only: bool = False) -> None:
        self._layouts, self._newest_only, self._newest = layouts, newest_only, 0
        self._reset()

    def _reset(self) -> None:
        self._main, self._fallback = Aggregate(self._layouts), Aggregate(self._layouts)
        self._shares: dict[str, float] = {}
        self._fallback_shares: dict[str, float] = {}

    def absorb(
        self,
        name: str,
        payload: Payload,
        scalars: Mapping[str, float],
        share: float | None,
        newest: int = 0,
    ) -> None:
        """Merge one edge's aggregate; `newest` is the number of its newest round with participants.

        Raises
        ------
        ValueError
            Like `Aggregate.absorb`.
        """
        if self._newest_only and newest != self._newest:
            if newest < self._newest:
                return
            Aggregate(self._layouts).absorb(
                payload, scalars
            )  # raises before the previous aggregates are dropped
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
            self._fallback_shares[name] = nominal

    def result(self) -> tuple[Aggregate, dict[str, float]]:
        """Return the merged aggregate, and the weight of each edge in its means."""
        counted = any(self._shares.values())
        aggregate, shares = (self._main, self._shares) if counted else (self._fallback, self._fallback_shares)
        total = sum(shares.values())
        return (aggregate if total else self._main), {n: s / total for n, s in shares.items() if s}
