"""Inquiries of the cloud to clients, sent through their edges, and their answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from espalier.config.timeouts import INQUIRY_MARGIN
from espalier.errors import UNSOUND, EspalierError, WireError
from espalier.methods.aggregate import forwarded_in
from espalier.methods.planning import Member
from espalier.methods.selection import Answer
from espalier.methods.views import answer_layouts
from espalier.wire.payload import Layout
from espalier.wire.sections import Payload, difference
from espalier_proto import espalier_pb2 as pb
from espalier_server.exchange import TRIES, Exchange

#: Inquiries whose answers are only reported.
MEASURES = frozenset({"accuracy", "samples"})


def spread(members: Sequence[Member], clients: Collection[str] | None) -> dict[str, str]:
    """Return the edge at which each client is asked; `clients` are all where it is None.

    Clients of several edges are spread over them by their place in the order of names.
    """
    reach = {m.name: m.edges for m in members if clients is None or m.name in clients}
    return {name: edges[i % len(edges)] for i, (name, edges) in enumerate(sorted(reach.items()))}


def ask(pose: Callable[[], Exchange]) -> dict[str, Answer]:
    """Send an inquiry; in a reproducible run, again until all clients have answered what training depends on.

    Parameters
    ----------
    pose : callable
        Returns the inquiry for the clients that are connected now.

    Raises
    ------
    EspalierError
        If a client did not answer it in a reproducible run in any of the tries.
    """
    for _ in range(TRIES):
        exchange = pose()
        kind, settings = exchange.plan.inquiry, exchange.settings
        found, asked = put(exchange)
        silent = sorted(asked - set(found))
        if not (silent and settings.reproducible) or kind in MEASURES:
            return found
        exchange.tree.gather(settings, lambda: False)
    raise EspalierError(
        f"{', '.join(silent)} did not answer a question ({kind}) in {TRIES} tries, so the run is not "
        "reproducible; see to them and resume it"
    )


def put(exchange: Exchange) -> tuple[dict[str, Answer], set[str]]:
    """Send an inquiry once; return the answers in the order of the clients' names, and the clients asked."""
    found: dict[str, Answer] = {}
    deadline = exchange.settings.round_deadline + INQUIRY_MARGIN
    for _, name, reply in exchange.named(exchange.tree.grid.exchange(exchange.send(), deadline=deadline)):
        try:
            report, payload = exchange.read(reply, name)
            answers = answers_in(exchange, report, payload)
        except (WireError, *UNSOUND) as error:
            exchange.refuse(reply, name, error)
            continue
        exchange.count(report)
        found |= answers
    asked = {p.client for r in exchange.plan.rounds for p in r.participants}
    return dict(sorted(found.items())), asked


def answers_in(exchange: Exchange, report: pb.EdgeReport, payload: Payload) -> dict[str, Answer]:
    """Read the answers of an edge's clients; raises WireError naming the edge."""
    plan, tree = exchange.plan, exchange.tree
    forwarded = forwarded_in(payload)
    found = {}
    for client in (c for record in report.rounds for c in record.clients):
        own, metrics = forwarded.get(client.client, {}), dict(client.metrics)
        try:
            expected = answer_layouts(
                plan.inquiry,
                plan.architecture,
                exchange.settings,
                plan.population,
                metrics,
                tree.image_shape,
            )
        except ValueError as error:
            raise WireError(report.edge, f"an answer of {client.client}: {error}") from error
        claimed = {s: expected.get(s, Layout(())).in_order(Layout.of(arrays)) for s, arrays in own.items()}
        if fault := difference(expected, claimed):
            raise WireError(report.edge, f"an answer of {client.client}: {fault}")
        # No inquiry has more than one section.
        tensors = {n: a for arrays in own.values() for n, a in arrays.items()}
        found[client.client] = Answer({"loss": client.loss, **metrics}, tensors)
    return found
