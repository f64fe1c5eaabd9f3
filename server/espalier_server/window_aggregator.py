"""Planning and aggregation of windows at the cloud."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from flwr.app import Message

from espalier.config.reproducible import in_order
from espalier.errors import UNSOUND, WireError
from espalier.methods.aggregate import Aggregate
from espalier.methods.base import CloudState, Method
from espalier.methods.homogeneity import ScoreSettings, sh_score
from espalier.methods.planning import Member, Round
from espalier.methods.selection import Answer
from espalier.wire.sections import GRADIENT, Payload, SectionId
from espalier_proto import espalier_pb2 as pb
from espalier_server.exchange import Exchange
from espalier_server.inquiries import ask, assign_edges
from espalier_server.planning.plans import Version, WindowDraw, draw_window, inquiry_plan, window_plan
from espalier_server.planning.tree import Tree
from espalier_server.window_outcome import CentralAggregate, WindowOutcome

log = logging.getLogger("espalier.cloud")

#: Name of the sections of `CloudState.memory` that hold the selection's state; its parts are their members.
SELECTION = "selection"


class WindowAggregator:
    """Plans windows, sends their plans to the edges, and updates the global state with the edges' aggregates.

    Parameters
    ----------
    method : Method
        The algorithm.
    state : CloudState
        The global state, which `advance` updates.
    tree : Tree
        Edges and clients.
    run : str
        Espalier's run id.
    reached : Mapping[str, Version], optional
        Newest state version of each client, from a checkpoint.
    """

    def __init__(
        self,
        method: Method,
        state: CloudState,
        tree: Tree,
        run: str,
        reached: Mapping[str, Version] | None = None,
    ) -> None:
        self.method, self.state, self.tree, self.run = method, state, tree, run
        self.settings = method.settings
        self.reached: dict[str, Version] = dict(reached or {})
        self.checkpoint_window = state.window
        #: Whether a window without training samples leaves the state unchanged, so that it can be repeated.
        self.may_repeat = False
        self.drawn = WindowDraw()
        self.outcome = WindowOutcome()
        self.selection = method.selection()
        self.selection.restore({s.member: a for s, a in state.memory.items() if s.name == SELECTION})
        self._exchange = self._exchange_of(pb.WindowPlan(), Payload({}))

    @property
    def plan(self) -> list[Round]:
        """Client -> edge, for each round of the window."""
        return self.drawn.rounds

    @property
    def first_round(self) -> int:
        """The window's first round."""
        return self.drawn.first_round

    # --- down --------------------------------------------------------------------------------------

    def draw(self, members: Sequence[Member] | None = None) -> WindowDraw:
        """Draw the next window: the participants of each round and their edges.

        Parameters
        ----------
        members : sequence of Member, optional
            Clients that can participate; by default those that are connected.
        """
        self.outcome = WindowOutcome()
        self._update_population(self.tree.population)
        members = self.tree.members() if members is None else members
        self.drawn = draw_window(self.method, self.selection, self.state, members, self.ask)
        return self.drawn

    def _update_population(self, population: int) -> None:
        """Rescale means over all N clients after N has changed; clients that have not trained count as zeros."""
        before, now = self.state.population, max(population, 1)
        if now != before and self.state.window:
            factor = before / now
            scaled = {
                section: {n: v * v.dtype.type(factor) for n, v in arrays.items()}
                for section, arrays in self.state.payload.views().items()
                if section.name in self.method.mean_sections
            }
            self.state.assign(scaled)
        self.state.population = now

    def send(self) -> Iterator[Message]:
        """Yield the message to every edge with participants: the window plan and the state's tensors."""
        plan = window_plan(
            self.method, self.state, self.run, self.drawn, self.reached, self.checkpoint_window
        )
        self._exchange = self._exchange_of(plan, self.state.payload)
        return self._exchange.send()

    def _exchange_of(self, plan: pb.WindowPlan, payload: Payload) -> Exchange:
        return Exchange(self.method, self.state, self.tree, self.outcome, plan, payload)

    # --- up ----------------------------------------------------------------------------------------

    def collect(self, replies: Iterable[Message]) -> tuple[CentralAggregate, int]:
        """Merge the edges' aggregates as they arrive, without changing the state.

        An invalid reply is recorded as a fault of its edge. In a reproducible run the aggregates are merged in the
        order of the edges' names, see `in_order`.

        Returns
        -------
        CentralAggregate
            The merged aggregates.
        int
            Number of training samples.
        """
        exchange = self._exchange
        merged = CentralAggregate(self.state.payload.layouts, self.method.newest_only)
        samples = 0
        named: Iterable[tuple[int, str, Message]] = exchange.named(replies)
        if self.settings.reproducible:
            named = in_order(((name, (node, name, reply)) for node, name, reply in named), exchange.edges)
        for node, name, reply in named:
            try:
                report, payload = exchange.read(reply, name)
                labels = self._labels(report, name)
                if report.samples:
                    share = self.method.edge_share(report.samples, report.last_round_samples, labels)
                    newest = max((r.round for r in report.rounds if r.clients), default=0)
                    merged.absorb(name, payload, report.metrics, share, newest)
            except (WireError, *UNSOUND) as error:
                exchange.refuse(reply, name, error)
                continue
            self._account(node, name, report)
            if report.samples:
                samples += report.samples
                self.outcome.mu[name] = sh_score(labels, self.settings.of(ScoreSettings).homogeneity_form)
        exchange.record_stragglers()
        return merged, samples

    def missing_clients(self) -> list[str]:
        """Return the nodes that are missing from the reports for a transient reason, as "NAME (REASON)"."""
        transient = {"lost", "straggler", "error"}
        return sorted({f"{f.node} ({f.detail})" for f in self.outcome.faults if f.kind in transient})

    def reset_outcome(self) -> None:
        """Discard the reports of the window, but not its traffic."""
        self.outcome = WindowOutcome(ledger=self.outcome.ledger)

    def advance(self, merged: CentralAggregate, samples: int) -> None:
        """Update the global state with the merged aggregates of a window.

        Without training samples the model is unchanged, and with `may_repeat` the window number, too.
        """
        if not samples and self.may_repeat:
            return
        aggregate, self.outcome.rho = merged.result()
        for report in self.outcome.reports.values():
            for record in report.rounds:
                for client in record.clients:
                    version = (report.window, record.round)
                    self.reached[client.client] = max(version, self.reached.get(client.client, (0, 0)))
        self.state.window += 1
        self.state.round += len(self.plan)
        self.state.notes = self._client_means()
        if samples:
            self.method.central_step(self.state, aggregate)
        self._observe(aggregate)
        # Replaced as a whole: entries that the sampler has dropped must not return from a checkpoint.
        others = {s: arrays for s, arrays in self.state.memory.items() if s.name != SELECTION}
        stored = {SectionId(SELECTION, part): dict(arrays) for part, arrays in self.selection.state().items()}
        self.state.memory = others | stored

    def _client_means(self) -> dict[str, float]:
        """Return the means over clients of the losses that they measured in the window's last round."""
        last = self.first_round + len(self.plan) - 1
        values: dict[str, list[float]] = {}
        for report in self.outcome.reports.values():
            for client in (c for r in report.rounds if r.round == last for c in r.clients):
                for name, value in client.metrics.items():
                    values.setdefault(name, []).append(value)
        return {name: float(np.mean(found)) for name, found in values.items() if name.endswith("-loss")}

    def _observe(self, aggregate: Aggregate) -> None:
        """Pass the metrics and gradients of the window's participants to the sampler."""
        gradients = {
            client: sections[GRADIENT]
            for client, sections in aggregate.forwarded.items()
            if GRADIENT in sections
        }
        for round_ in range(self.first_round, self.first_round + len(self.plan)):
            metrics = {
                c.client: {"loss": c.loss, **c.metrics}
                for report in self.outcome.reports.values()
                for record in report.rounds
                if record.round == round_
                for c in record.clients
            }
            self.selection.observe(round_, metrics, {c: g for c, g in gradients.items() if c in metrics})

    def _labels(self, report: pb.EdgeReport, name: str) -> np.ndarray:
        classes, counts = len(self.tree.classes), report.labels.counts
        if len(counts) not in (0, classes) or not all(np.isfinite(c) and c >= 0 for c in counts):
            raise WireError(
                name,
                f"a label distribution of {len(counts)} counts for {classes} classes, or an invalid count",
            )
        if report.samples and not counts:
            raise WireError(name, "samples without a label distribution")
        return np.asarray(counts, dtype=np.float64) if counts else np.zeros(classes)

    def _account(self, node: int, name: str, report: pb.EdgeReport) -> None:
        self.outcome.reports[name] = report
        self._exchange.count(report)
        if report.HasField("roster"):
            self.tree.learn(node, report.roster)

    # --- inquiries ---------------------------------------------------------------------------------

    def ask(
        self,
        kind: str,
        architecture: pb.ArchitectureSpec,
        payload: Payload,
        clients: Sequence[str] | None = None,
        keys: Mapping[str, str] | None = None,
    ) -> dict[str, Answer]:
        """Send an inquiry about a network to clients through their edges; return the answers that arrive, by client.

        Parameters
        ----------
        kind : str
            One of `espalier.methods.views.INQUIRIES`.
        architecture : pb.ArchitectureSpec
            The network.
        payload : Payload
            The network's tensors, and the method's sections that clients need.
        clients : sequence of str, optional
            The clients that receive the inquiry; None: all.
        keys : mapping of str to str, optional
            Client -> key of its view, for clients with a sub-model.

        Raises
        ------
        EspalierError
            In a reproducible run, if clients do not answer; see `inquiries.ask`.
        """

        def create_exchange() -> Exchange:
            plan = inquiry_plan(
                self.method,
                self.state,
                self.run,
                kind,
                architecture,
                payload.layouts,
                assign_edges(self.tree.members(), clients),
                keys or {},
                self.reached,
                self.checkpoint_window,
            )
            return self._exchange_of(plan, payload)

        return ask(create_exchange)
