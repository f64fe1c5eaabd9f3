"""Builds the record of a window from its plan and the edges' reports."""

from __future__ import annotations

from espalier_server.records.record import Participation, RoundEntry, SignatureEntry, Traffic, WindowEntry
from espalier_server.window_aggregator import WindowAggregator
from espalier_server.window_outcome import WindowOutcome


def window_entry(
    strategy: WindowAggregator, seconds: float, mu_planned: float, mu_random: float
) -> WindowEntry:
    """Return the entry of an aggregated window in report.json.

    Parameters
    ----------
    strategy : WindowAggregator
        The window after its aggregation.
    seconds : float
        Its duration.
    mu_planned, mu_random : float
        See :class:`~espalier_server.records.record.WindowEntry`.
    """
    outcome = strategy.outcome
    return WindowEntry(
        window=strategy.state.window,
        rounds=round_entries(strategy),
        rho=dict(outcome.rho),
        mu=dict(outcome.mu),
        mu_planned=mu_planned,
        mu_random=mu_random,
        samples={name: r.samples for name, r in outcome.reports.items()},
        labels={name: list(r.labels.counts) for name, r in outcome.reports.items()},
        # What follows an "@" in a key distinguishes the clients of a group; it is not part of the name.
        assignments={
            c: key.partition("@")[0] for keys in strategy.drawn.keys for c, key in keys.items() if key
        },
        links={k: Traffic(**v) for k, v in outcome.ledger.as_dict().items()},
        metrics=dict(strategy.state.notes),
        signatures=signature_entry(outcome),
        timings={"train": seconds},
    )


def round_entries(strategy: WindowAggregator) -> list[RoundEntry]:
    """Return the entries of a window's rounds, each merged from the edges' reports of it."""
    entries = []
    for round_ in range(strategy.first_round, strategy.first_round + len(strategy.plan)):
        records = [
            (name, record)
            for name, report in sorted(strategy.outcome.reports.items())
            for record in report.rounds
            if record.round == round_
        ]
        clients = [(edge, client) for edge, record in records for client in record.clients]
        samples = sum(c.samples for _, c in clients)
        entries.append(
            RoundEntry(
                round=round_,
                loss=sum(c.loss * c.samples for _, c in clients) / samples if samples else None,
                participants=[
                    Participation(client=c.client, edge=e, signed=c.HasField("signed")) for e, c in clients
                ],
                samples=samples,
                seconds=max((record.seconds for _, record in records), default=0.0),
            )
        )
    return entries


def client_trainings(outcome: WindowOutcome) -> dict[str, dict[str, float]]:
    """Return each client's training in a window, for the ``window-end`` event.

    Returns
    -------
    dict of str to dict of str to float
        By client: ``loss``, ``steps`` and ``seconds`` of its last round; ``rounds``, ``total_seconds`` and
        ``total_cpu_seconds`` over the window.
    """
    found: dict[str, dict[str, float]] = {}
    records = [record for report in outcome.reports.values() for record in report.rounds]
    for record in sorted(records, key=lambda record: record.round):
        for client in record.clients:
            before = found.get(client.client, {"rounds": 0, "total_seconds": 0.0, "total_cpu_seconds": 0.0})
            found[client.client] = {
                "loss": client.loss,
                "steps": client.steps,
                "seconds": client.seconds,
                "rounds": before["rounds"] + 1,
                "total_seconds": before["total_seconds"] + client.seconds,
                "total_cpu_seconds": before["total_cpu_seconds"] + client.cpu_seconds,
            }
    return found


def signature_entry(outcome: WindowOutcome) -> SignatureEntry:
    """Return the number of signatures that the edges and the cloud checked, and the clients that did not sign."""
    found = outcome.signatures
    return SignatureEntry(edges=found.edges, cloud=found.cloud, unsigned=sorted(found.unsigned))
