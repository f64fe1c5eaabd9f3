"""Questions of the cloud to clients, put to them through their edges, and their answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from espalier.config.timeouts import INQUIRY_MARGIN
from espalier.errors import UNSOUND, EspalierError, WireError
from espalier.methods.planning import Member
from espalier.methods.selection import Answer
from espalier.methods.tally import stacked
from espalier.methods.views import answer_layout
from espalier.wire.payload import Layout, Weights
from espalier_proto import espalier_pb2 as pb
from espalier_server.exchange import TRIES, Exchange

#: Questions whose answers are only reported.
MEASURES = frozenset({"accuracy", "samples"})


def spread(members: Sequence[Member], clients: Collection[str] | None) -> dict[str, str]:
    """Return the edge at which each client is asked; `clients` are all where it is None.

    Clients of several edges are spread over them by their place in the order of names.
    """
    reach = {m.name: m.edges for m in members if clients is None or m.name in clients}
    return {name: edges[i % len(edges)] for i, (name, edges) in enumerate(sorted(reach.items()))}


def ask(pose: Callable[[], Exchange]) -> dict[str, Answer]:
    """Put a question; in a reproducible run, again until everybody has answered what training hangs on.

    Parameters
    ----------
    pose : callable
        Returns the question as it is put now: clients may have come and gone since it was put before.

    Raises
    ------
    EspalierError
        If somebody did not answer it in a reproducible run, however often it was put.
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
    """Put a question once; return the answers in the order of the clients' names, and who was asked."""
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


def answers_in(exchange: Exchange, report: pb.EdgeReport, payload: Weights) -> dict[str, Answer]:
    """Read what an edge's clients answered; raises WireError naming the edge."""
    plan, tree = exchange.plan, exchange.tree
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for sender, tensor, array in stacked(payload):
        arrays.setdefault(sender, {})[tensor] = array
    found = {}
    for client in (c for record in report.rounds for c in record.clients):
        own, metrics = arrays.get(client.client, {}), dict(client.metrics)
        try:
            expected = answer_layout(
                plan.inquiry,
                plan.architecture,
                exchange.settings,
                plan.population,
                metrics,
                tree.image_shape,
            )
        except ValueError as error:
            raise WireError(report.edge, f"an answer of {client.client}: {error}") from error
        if fault := expected.difference(expected.in_order(Layout.of(own))):
            raise WireError(report.edge, f"an answer of {client.client}: {fault}")
        tensors = {n.partition("/")[2]: a for n, a in own.items()}
        found[client.client] = Answer({"loss": client.loss, **metrics}, tensors)
    return found
