"""Windows as a Flower strategy: plans and tensors go to the edges, their tallies become the next state."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from espalier.config.reproducible import in_order
from espalier.errors import UNSOUND, WireError
from espalier.methods.base import CloudState, Method
from espalier.methods.homogeneity import ScoreSettings, sh_score
from espalier.methods.planning import Member, Round
from espalier.methods.selection import Answer
from espalier.methods.tally import Tally
from espalier.wire import control
from espalier.wire.payload import Weights
from espalier_proto import espalier_pb2 as pb
from espalier_server.exchange import Exchange
from espalier_server.inquiries import ask, spread
from espalier_server.outcome import CentralTally, WindowOutcome
from espalier_server.planning.plans import Version, WindowDraw, draw_window, inquiry_plan, window_plan
from espalier_server.planning.tree import Tree

log = logging.getLogger("espalier.cloud")


class WindowStrategy(Strategy):
    """One of Flower's rounds is one window of the tree.

    Parameters
    ----------
    method : Method
        The algorithm.
    state : CloudState
        The global state; `aggregate_train` moves it on.
    tree : Tree
        Edges and clients.
    run : str
        Espalier's run id.
    reached : Mapping[str, Version], optional
        Newest state version of each client that the cloud knows of, from a checkpoint.
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
        #: Whether a window in which nobody trained leaves the state as it was, to be tried again.
        self.may_repeat = False
        self.drawn = WindowDraw()
        self.outcome = WindowOutcome()
        self.selection = method.selection()
        head = "selection/"
        self.selection.restore(
            {k.removeprefix(head): v for k, v in state.extra.items() if k.startswith(head)}
        )
        self._exchange = self._exchange_of(pb.WindowPlan(), Weights.pack({}))

    @property
    def plan(self) -> list[Round]:
        """Client -> edge, for each round of the window."""
        return self.drawn.rounds

    @property
    def first_round(self) -> int:
        """The window's first round."""
        return self.drawn.first_round

    def summary(self) -> None:
        """Log what will be run."""
        s = self.settings
        log.info("%s: %d rounds in %d windows of %d", self.method.name, s.rounds, s.windows, s.rg)

    # --- down --------------------------------------------------------------------------------------

    def draw(self, members: Sequence[Member] | None = None) -> WindowDraw:
        """Draw the next window: who trains in each of its rounds, and at which edge.

        Parameters
        ----------
        members : sequence of Member, optional
            Clients that can take part; by default those that are connected now.
        """
        self.outcome = WindowOutcome()
        self._grow(self.tree.population)
        members = self.tree.members() if members is None else members
        self.drawn = draw_window(self.method, self.selection, self.state, members, self.ask)
        return self.drawn

    def _grow(self, population: int) -> None:
        """Take note of clients that joined: what is a mean over all N clients counts them as zeros."""
        before, now = self.state.population, max(population, 1)
        if now != before and self.state.window:
            grown = {
                n: v * v.dtype.type(before / now)
                for n, v in self.state.tensors.items()
                if n.partition("/")[0] in self.method.mean_sections
            }
            self.state.assign(grown)
        self.state.population = now

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the plan and the state's tensors to every edge that has a part in it.

        `arrays` are not looked at: the state has the same tensors, and more.
        """
        plan = window_plan(
            self.method, self.state, self.run, self.drawn, self.reached, self.checkpoint_window
        )
        self._exchange = self._exchange_of(plan, self.state.weights)
        return self._exchange.send()

    def _exchange_of(self, plan: pb.WindowPlan, weights: Weights) -> Exchange:
        return Exchange(self.method, self.state, self.tree, self.outcome, plan, weights)

    # --- up ----------------------------------------------------------------------------------------

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the edges' tallies as they arrive, and move the global state on by a window.

        A reply that is not sound is refused by name, and the window goes on without it. If no edge
        has a sample the model stays as it was, and so does the window where it may be repeated.
        """
        return self.move_on(*self.collect(replies))

    def collect(self, replies: Iterable[Message]) -> tuple[CentralTally, int]:
        """Merge the edges' tallies as they arrive; the state stays as it is.

        In a reproducible run they are merged in the order of the edges' names, see `in_order`.

        Returns
        -------
        CentralTally
            The sums.
        int
            Training samples behind them.
        """
        exchange = self._exchange
        merged = CentralTally(self.state.weights.layout, self.method.newest_only)
        samples = 0
        found: Iterable[tuple[int, str, Message]] = exchange.named(replies)
        if self.settings.reproducible:
            found = in_order(((name, (node, name, reply)) for node, name, reply in found), exchange.edges)
        for node, name, reply in found:
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
        exchange.note_silent()
        return merged, samples

    def lacking(self) -> list[str]:
        """Return whom the window's reports lack by chance: what went wrong there may go well another time."""
        chance = {"lost", "straggler", "error"}
        return sorted({f"{f.node} ({f.detail})" for f in self.outcome.faults if f.kind in chance})

    def again(self) -> None:
        """Forget the reports of the window; the bytes stay counted."""
        self.outcome = WindowOutcome(ledger=self.outcome.ledger)

    def move_on(self, merged: CentralTally, samples: int) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Move the global state on by the window that was collected; see `aggregate_train`."""
        if not samples and self.may_repeat:
            return None, MetricRecord({"edges": 0, control.NUM_EXAMPLES: 0})
        tally, self.outcome.rho = merged.result()
        for report in self.outcome.reports.values():
            for record in report.rounds:
                for client in record.clients:
                    version = (report.window, record.round)
                    self.reached[client.client] = max(version, self.reached.get(client.client, (0, 0)))
        self.state.window += 1
        self.state.round += len(self.plan)
        self.state.notes = self._client_means()
        if samples:
            self.method.central_step(self.state, tally)
        self._observe(tally)
        # What the selection has forgotten must not come back from a checkpoint.
        kept = {k: v for k, v in self.state.extra.items() if not k.startswith("selection/")}
        self.state.extra = kept | {f"selection/{k}": v for k, v in self.selection.state().items()}
        return (self.state.weights.to_record() if samples else None), MetricRecord(
            {"edges": len(self.outcome.reports), control.NUM_EXAMPLES: samples}
        )

    def _client_means(self) -> dict[str, float]:
        """Return the mean over clients of what they measured in the window's last round."""
        last = self.first_round + len(self.plan) - 1
        found: dict[str, list[float]] = {}
        for report in self.outcome.reports.values():
            for client in (c for r in report.rounds if r.round == last for c in r.clients):
                for name, value in client.metrics.items():
                    found.setdefault(name, []).append(value)
        return {name: float(np.mean(values)) for name, values in found.items() if name.endswith("-loss")}

    def _observe(self, tally: Tally) -> None:
        """Tell the selection what the window's participants reported."""
        head = "gradient/"
        gradients = {
            client: {n.removeprefix(head): a for n, a in stack.items() if n.startswith(head)}
            for client, stack in tally.stacks.items()
        }
        for round_ in range(self.first_round, self.first_round + len(self.plan)):
            metrics = {
                c.client: {"loss": c.loss, **c.metrics}
                for report in self.outcome.reports.values()
                for record in report.rounds
                if record.round == round_
                for c in record.clients
            }
            self.selection.observe(
                round_, metrics, {c: g for c, g in gradients.items() if c in metrics and g}
            )

    def _labels(self, report: pb.EdgeReport, name: str) -> np.ndarray:
        classes, counts = len(self.tree.classes), report.labels.counts
        if len(counts) not in (0, classes) or not all(np.isfinite(c) and c >= 0 for c in counts):
            raise WireError(
                name, f"a label distribution of {len(counts)} counts for {classes} classes, or a bad count"
            )
        if report.samples and not counts:
            raise WireError(name, "samples without a label distribution")
        return np.asarray(counts, dtype=np.float64) if counts else np.zeros(classes)

    def _account(self, node: int, name: str, report: pb.EdgeReport) -> None:
        self.outcome.reports[name] = report
        self._exchange.count(report)
        if report.HasField("roster"):
            self.tree.learn(node, report.roster)

    # --- beside training ---------------------------------------------------------------------------

    def ask(
        self,
        kind: str,
        architecture: pb.ArchitectureSpec,
        weights: Weights,
        clients: Sequence[str] | None = None,
        keys: Mapping[str, str] | None = None,
    ) -> dict[str, Answer]:
        """Ask clients about a network, through their edges; who does not answer is left out.

        Parameters
        ----------
        kind : str
            One of `espalier.methods.views.INQUIRIES`.
        architecture : pb.ArchitectureSpec
            The network.
        weights : Weights
            Its tensors, and sections the method wants clients to see.
        clients : sequence of str, optional
            Whom to ask; None: everyone.
        keys : mapping of str to str, optional
            Client -> key of the view it is asked about, where that is not the whole.

        Raises
        ------
        EspalierError
            Like `inquiries.ask`, in a reproducible run.
        """

        def pose() -> Exchange:
            plan = inquiry_plan(
                self.method,
                self.state,
                self.run,
                kind,
                architecture,
                weights.layout,
                spread(self.tree.members(), clients),
                keys or {},
                self.reached,
                self.checkpoint_window,
            )
            return self._exchange_of(plan, weights)

        return ask(pose)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        """Ask nobody: the cloud measures, and clients are asked by `ask`."""
        return iter(())

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing."""
        return None
