"""Verification of the clients' signatures in an edge's report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from espalier.errors import WireError
from espalier.wire.signature import digest, mismatch, statement_of, verify
from espalier_proto import espalier_pb2 as pb


@dataclass
class SignatureCounts:
    """Results of the verification of the signatures of a window or an inquiry.

    Attributes
    ----------
    edges, cloud : int
        Number of valid signatures according to the edges, and as verified at the cloud.
    unsigned : set of str
        Clients whose updates or answers were accepted without a signature.
    """

    edges: int = 0
    cloud: int = 0
    unsigned: set[str] = field(default_factory=set)

    def add(self, other: SignatureCounts) -> None:
        """Add the counts of another report."""
        self.edges += other.edges
        self.cloud += other.cloud
        self.unsigned |= other.unsigned


def check_contributions(
    plan: pb.WindowPlan, report: pb.EdgeReport, key_of: Callable[[str], bytes | None], *, required: bool
) -> SignatureCounts:
    """Check that an edge aggregated only updates that its clients signed for this plan, each once.

    A single update cannot be removed from an edge's aggregate, so one invalid entry invalidates the report.

    Parameters
    ----------
    plan : pb.WindowPlan
        The plan that the edge received.
    report : pb.EdgeReport
        The edge's report.
    key_of : callable
        Returns the public key of a client, None if it is unknown or revoked.
    required : bool
        Whether an update without a signature invalidates the report, too.

    Raises
    ------
    WireError
        If an entry is invalid; it names the edge and the client.
    """
    edge, checked, samples = report.edge, SignatureCounts(edges=report.signatures), 0
    planned = {(r.round, p.client): p for r in plan.rounds for p in r.participants if p.edge == edge}
    digests: dict[str, bytes] = {}
    seen: set[tuple[int, str]] = set()
    for record in report.rounds:
        for client in record.clients:
            key_in_plan = record.round, client.client
            what = f"an update of {client.client!r} in round {record.round}"
            if key_in_plan not in planned:
                raise WireError(edge, f"{what}, which was not planned there")
            if key_in_plan in seen:
                raise WireError(edge, f"{what} a second time")
            seen.add(key_in_plan)
            samples += client.samples
            if not client.HasField("signed"):
                if required:
                    raise WireError(edge, f"{what} that {client.client} did not sign")
                checked.unsigned.add(client.client)
                continue
            key = key_of(client.client)
            if key is None:
                raise WireError(edge, f"{what}, whose key is unknown or revoked")
            view = planned[key_in_plan].view
            if view not in digests:
                digests[view] = digest(plan.views[view].architecture if view else plan.architecture)
            _check_signature(plan, record.round, client, edge, key, digests[view])
            checked.cloud += 1
    if not plan.inquiry and samples != report.samples:
        raise WireError(edge, f"{report.samples} samples, but its clients' updates have {samples}")
    return checked


def _check_signature(
    plan: pb.WindowPlan, round_: int, client: pb.ClientReport, edge: str, key: bytes, architecture: bytes
) -> None:
    try:
        statement = verify(client.signed, key, client.client)
    except WireError as error:
        raise WireError(edge, f"an update of {client.client!r} with {error.fault}") from error
    client_plan = pb.RoundPlan(
        run=plan.run,
        window=plan.window,
        round=round_,
        client=client.client,
        edge=edge,
        inquiry=plan.inquiry,
        nonce=plan.nonce,
    )
    expected = statement_of(client_plan, client, statement.payload)
    # The cloud does not have the payload, so it cannot verify its digest and its form.
    expected.form, expected.architecture = statement.form, architecture
    if fault := mismatch(statement, expected):
        raise WireError(edge, f"an update of {client.client!r}: {fault}")
