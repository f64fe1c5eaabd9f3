"""Who contributed to an edge's report: each client's signature, checked against the keys the cloud knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from espalier.errors import WireError
from espalier.wire.signature import digest, mismatch, statement_of, verify
from espalier_proto import espalier_pb2 as pb


@dataclass
class Checked:
    """What the signatures of a window, or of an inquiry, came to.

    Attributes
    ----------
    edges, cloud : int
        Signatures that the edges say they checked, and that the cloud checked itself.
    unsigned : set of str
        Clients of which something was let in without one.
    """

    edges: int = 0
    cloud: int = 0
    unsigned: set[str] = field(default_factory=set)

    def add(self, other: Checked) -> None:
        """Add those of another report."""
        self.edges += other.edges
        self.cloud += other.cloud
        self.unsigned |= other.unsigned


def check_contributions(
    plan: pb.WindowPlan, report: pb.EdgeReport, key_of: Callable[[str], bytes | None], *, required: bool
) -> Checked:
    """Check that an edge counts only what clients signed for it, in this plan, once each.

    What one client signed cannot be taken out of an edge's sums, so one bad entry spoils the report.

    Parameters
    ----------
    plan : pb.WindowPlan
        What the edge was sent.
    report : pb.EdgeReport
        What it answers.
    key_of : callable
        Returns the public key that the cloud knows a client by, None for one unknown or revoked.
    required : bool
        Whether an update without a signature spoils the report, too.

    Raises
    ------
    WireError
        Naming the edge, and the client whose entry is bad.
    """
    edge, checked, samples = report.edge, Checked(edges=report.signatures), 0
    planned = {(r.round, p.client): p for r in plan.rounds for p in r.participants if p.edge == edge}
    digests: dict[str, bytes] = {}
    seen: set[tuple[int, str]] = set()
    for record in report.rounds:
        for client in record.clients:
            place = record.round, client.client
            who = f"an update of {client.client!r} in round {record.round}"
            if place not in planned:
                raise WireError(edge, f"{who}, who was not planned there")
            if place in seen:
                raise WireError(edge, f"{who} a second time")
            seen.add(place)
            samples += client.samples
            if not client.HasField("signed"):
                if required:
                    raise WireError(edge, f"{who} that {client.client} did not sign")
                checked.unsigned.add(client.client)
                continue
            key = key_of(client.client)
            if key is None:
                raise WireError(edge, f"{who}, whose key is unknown or revoked")
            view = planned[place].view
            if view not in digests:
                digests[view] = digest(plan.views[view].architecture if view else plan.architecture)
            _check_signature(plan, record.round, client, edge, key, digests[view])
            checked.cloud += 1
    if not plan.inquiry and samples != report.samples:
        raise WireError(edge, f"{report.samples} samples, its clients' updates stand for {samples}")
    return checked


def _check_signature(
    plan: pb.WindowPlan, round_: int, client: pb.ClientReport, edge: str, key: bytes, architecture: bytes
) -> None:
    try:
        said = verify(client.signed, key, client.client)
    except WireError as error:
        raise WireError(edge, f"an update of {client.client!r} with {error.fault}") from error
    asked = pb.RoundPlan(
        run=plan.run,
        window=plan.window,
        round=round_,
        client=client.client,
        edge=edge,
        inquiry=plan.inquiry,
        nonce=plan.nonce,
    )
    expected = statement_of(asked, client, said.payload)
    # The payload went into the edge's sums, and with it what describes it.
    expected.form, expected.architecture = said.form, architecture
    if fault := mismatch(said, expected):
        raise WireError(edge, f"an update of {client.client!r}: {fault}")
