"""Inquiries of the cloud to clients through their edges, and the answers."""

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
from espalier_server.exchange import MAX_ATTEMPTS, Exchange
from espalier_server.planning.joining import wait_for_members

#: Inquiries whose answers are recorded only and do not affect training.
EVALUATION_ONLY = frozenset({"accuracy", "samples"})


def assign_edges(members: Sequence[Member], clients: Collection[str] | None) -> dict[str, str]:
    """Return the edge through which each client receives an inquiry; `clients` None: all members.

    Clients with several edges are distributed over them in turn, in the order of their names.
    """
    edges_of = {m.name: m.edges for m in members if clients is None or m.name in clients}
    return {name: edges[i % len(edges)] for i, (name, edges) in enumerate(sorted(edges_of.items()))}


def ask(create_exchange: Callable[[], Exchange]) -> dict[str, Answer]:
    """Send an inquiry; in a reproducible run, repeat it until all clients have answered, unless it only evaluates.

    Parameters
    ----------
    create_exchange : callable
        Returns the exchange of the inquiry with the clients that are connected now.

    Raises
    ------
    EspalierError
        If a client of a reproducible run did not answer in any attempt.
    """
    for _ in range(MAX_ATTEMPTS):
        exchange = create_exchange()
        kind, settings = exchange.plan.inquiry, exchange.settings
        answers, recipients = send_once(exchange)
        unanswered = sorted(recipients - set(answers))
        if not (unanswered and settings.reproducible) or kind in EVALUATION_ONLY:
            return answers
        wait_for_members(exchange.tree, settings, lambda: False)
    raise EspalierError(
        f"{', '.join(unanswered)} did not answer an inquiry ({kind}) in {MAX_ATTEMPTS} attempts, so the run is "
        "not reproducible; restart them and resume it"
    )


def send_once(exchange: Exchange) -> tuple[dict[str, Answer], set[str]]:
    """Send an inquiry once; return the answers in the order of the clients' names, and all recipients."""
    found: dict[str, Answer] = {}
    deadline = exchange.settings.round_deadline + INQUIRY_MARGIN
    for _, name, reply in exchange.named(exchange.tree.grid.exchange(exchange.send(), deadline=deadline)):
        try:
            report, payload = exchange.read(reply, name)
            answers = read_answers(exchange, report, payload)
        except (WireError, *UNSOUND) as error:
            exchange.refuse(reply, name, error)
            continue
        exchange.count(report)
        found |= answers
    recipients = {p.client for r in exchange.plan.rounds for p in r.participants}
    return dict(sorted(found.items())), recipients


def read_answers(exchange: Exchange, report: pb.EdgeReport, payload: Payload) -> dict[str, Answer]:
    """Return the answers in an edge's report by client; raises WireError that names the edge."""
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
