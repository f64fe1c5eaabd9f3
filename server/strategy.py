"""Windows as a Flower strategy: plans and tensors go to the edges, their tallies become the next state."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from common.errors import UNSOUND, EspalierError, WireError, unsound
from common.flower.arrays import payload_bytes
from common.flower.outcomes import fault_kind
from common.homogeneity import sh_score
from common.methods.base import CloudState, Method
from common.methods.planning import Member, Round
from common.methods.selection import Answer
from common.methods.tally import ROWS, Tally, stacked
from common.methods.views import answer_layout, buffers_of
from common.run.ledger import CLIENT_EDGE, EDGE_CLOUD
from common.run.reproducible import in_order
from common.run.timeouts import INQUIRY_MARGIN
from common.wire import control
from common.wire.codec import create_codec
from common.wire.payload import Layout, Weights
from common.wire.sent import SentForm
from common.wire.update import UpdateForm
from proto import espalier_pb2 as pb
from server.contributions import check_contributions
from server.outcome import CentralTally, WindowOutcome
from server.plans import Version, WindowDraw, draw_window, inquiry_plan, window_plan
from server.tree import Tree

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
        self._sent: pb.WindowPlan = pb.WindowPlan()
        #: The network's tensors as the edges read them, which their reports may be differences to.
        self._received = Weights.pack({})

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
        """Yield the plan and the state's tensors to every edge that has a part in it.

        All edges get one and the same content, so it is stored and hashed once. `arrays` are not looked at: the
        state has the same tensors, and more.
        """
        self._sent = window_plan(
            self.method, self.state, self.run, self.drawn, self.reached, self.checkpoint_window
        )
        yield from self._to_edges(self._sent, self.state.weights, self.drawn.edges, control.TRAIN)

    def _to_edges(
        self, plan: pb.WindowPlan, weights: Weights, edges: Sequence[str], kind: str
    ) -> Iterator[Message]:
        form = SentForm(weights.layout, plan.architecture, self.settings)
        coded, self._received = form.encode(weights)
        content = control.plan_content(plan, coded.to_record())
        size, nodes = payload_bytes(content), self.tree.edges()
        for edge in edges:
            if edge not in nodes:
                self._fault(edge, "lost", "went away before its part was sent")
                continue
            self.outcome.ledger.add(EDGE_CLOUD, down_bytes=size, messages=1)
            yield Message(content, nodes[edge], kind, group_id=str(plan.window))

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
        merged = CentralTally(self.state.weights.layout, self.method.newest_only)
        samples = 0
        found: Iterable[tuple[int, str, Message]] = self._named(replies)
        if self.settings.reproducible:
            found = in_order(((name, (node, name, reply)) for node, name, reply in found), self.drawn.edges)
        for node, name, reply in found:
            try:
                report, payload = self._read(reply, name)
                labels = self._labels(report, name)
                if report.samples:
                    share = self.method.edge_share(report.samples, report.last_round_samples, labels)
                    newest = max((r.round for r in report.rounds if r.clients), default=0)
                    merged.absorb(name, payload, report.metrics, share, newest)
            except (WireError, *UNSOUND) as error:
                self._refuse(reply, name, error)
                continue
            self._account(node, name, report)
            if report.samples:
                samples += report.samples
                self.outcome.mu[name] = sh_score(labels, self.settings.homogeneity_form)
        self._note_silent(set(self.drawn.edges))
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

    def _named(self, replies: Iterable[Message]) -> Iterator[tuple[int, str, Message]]:
        for reply in replies:
            node = reply.metadata.src_node_id
            yield node, self.tree.name_of(node), reply

    def _read(self, reply: Message, name: str) -> tuple[pb.EdgeReport, Weights]:
        report = control.read_control(pb.EdgeReport, reply, name)
        if report.edge != name:
            raise WireError(name, f"a report in the name of {report.edge!r}")
        control.check_same_run(self._sent, report, name)
        if report.HasField("roster") and report.roster.name != name:
            raise WireError(name, f"a list of clients in the name of {report.roster.name!r}")
        checked = check_contributions(
            self._sent, report, self.tree.keys.in_force().get, required=self.settings.require_signatures
        )
        payload = self._tensors(reply, Layout.from_proto(report.layout.tensors, name), name)
        # Not only of those it lists: a method may want to know of an update that it left out (Phoenix).
        given = {p.client for r in self._sent.rounds for p in r.participants if p.edge == name}
        if foreign := {c for c, _, _ in stacked(payload)} - given:
            raise WireError(name, f"tensors of {sorted(foreign)[:3]}, which it was not given")
        if not self._sent.inquiry:
            self._check_passed(payload)
        self.outcome.signatures.add(checked)
        return report, payload

    def _tensors(self, reply: Message, layout: Layout, name: str) -> Weights:
        """Read a report's tensors; of the network's it may hold coded differences."""
        s, received = self.settings, self._received
        if s.edge_codec == "none":
            return control.read_weights(reply, layout, name)
        codec, buffers = create_codec(s, s.edge_codec), buffers_of(self._sent.architecture)
        form = UpdateForm(layout, received.layout, buffers, codec)
        payload = control.read_weights(reply, form.wire, name)
        return Weights.fill(layout, form.decode(payload, received.views(), name))

    def _check_passed(self, payload: Weights) -> None:
        """Have the method look at what the edge passes on beside its sums; raises ValueError."""
        stacks: dict[str, dict[str, np.ndarray]] = {}
        for client, tensor, array in stacked(payload):
            stacks.setdefault(client, {})[tensor] = array
        rows = {n.removeprefix(ROWS): a for n, a in payload.views().items() if n.startswith(ROWS)}
        self.method.check_passed(stacks, rows, self.state)

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
        self._count_bytes(report)
        if report.HasField("roster"):
            self.tree.learn(node, report.roster)

    def _count_bytes(self, report: pb.EdgeReport) -> None:
        self.outcome.faults.extend(report.faults)
        down = report.client_edge
        self.outcome.ledger.add(
            CLIENT_EDGE, up_bytes=down.up_bytes, down_bytes=down.down_bytes, messages=down.messages
        )
        self.outcome.ledger.add(EDGE_CLOUD, up_bytes=report.up_bytes, messages=1)

    def _refuse(self, reply: Message, name: str, error: Exception) -> None:
        self._fault(name, fault_kind(reply), error.fault if isinstance(error, WireError) else unsound(error))

    def _note_silent(self, asked: set[str]) -> None:
        for silent in sorted(asked - set(self.outcome.reports) - {f.node for f in self.outcome.faults}):
            self._fault(silent, "straggler", "no report of the window before its deadline")

    def _fault(self, node: str, kind: str, detail: str) -> None:
        log.warning("window %d: %s %s: %s", self.state.window + 1, node, kind, detail)
        self.outcome.faults.append(
            pb.Fault(tier="cloud", node=node, kind=kind, detail=detail, window=self.state.window + 1)
        )

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

        In a reproducible run everybody must answer what training hangs on, so the question is put again.

        Parameters
        ----------
        kind : str
            One of `common.methods.views.INQUIRIES`.
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
            If somebody did not answer it in a reproducible run, however often it was put.
        """
        for _ in range(TRIES):
            found, asked = self._ask(kind, architecture, weights, clients, keys)
            silent = sorted(asked - set(found))
            if not (silent and self.settings.reproducible) or kind in MEASURES:
                return found
            self.tree.gather(self.settings, lambda: False)
        raise EspalierError(
            f"{', '.join(silent)} did not answer a question ({kind}) in {TRIES} tries, so the run is not "
            "reproducible; see to them and resume it"
        )

    def _ask(
        self,
        kind: str,
        architecture: pb.ArchitectureSpec,
        weights: Weights,
        clients: Sequence[str] | None,
        keys: Mapping[str, str] | None,
    ) -> tuple[dict[str, Answer], set[str]]:
        """Ask once; return the answers in the order of the clients' names, and who was asked."""
        reach = {m.name: m.edges for m in self.tree.members() if clients is None or m.name in clients}
        # Clients of several edges are spread over them by their place in the order of names.
        where = {name: edges[i % len(edges)] for i, (name, edges) in enumerate(sorted(reach.items()))}
        self._sent = inquiry_plan(
            self.method,
            self.state,
            self.run,
            kind,
            architecture,
            weights.layout,
            where,
            keys or {},
            self.reached,
            self.checkpoint_window,
        )
        messages = self._to_edges(self._sent, weights, sorted(set(where.values())), control.INQUIRY)
        found: dict[str, Answer] = {}
        deadline = self.settings.round_deadline + INQUIRY_MARGIN
        for _, name, reply in self._named(self.tree.grid.exchange(messages, deadline=deadline)):
            try:
                report, payload = self._read(reply, name)
                answers = self._answers(kind, architecture, report, payload)
            except (WireError, *UNSOUND) as error:
                self._refuse(reply, name, error)
                continue
            self._count_bytes(report)
            found |= answers
        return dict(sorted(found.items())), set(where)

    def _answers(
        self, kind: str, architecture: pb.ArchitectureSpec, report: pb.EdgeReport, payload: Weights
    ) -> dict[str, Answer]:
        """Read what an edge's clients answered; raises WireError naming the edge."""
        arrays: dict[str, dict[str, np.ndarray]] = {}
        for sender, tensor, array in stacked(payload):
            arrays.setdefault(sender, {})[tensor] = array
        found = {}
        for client in (c for record in report.rounds for c in record.clients):
            own, metrics = arrays.get(client.client, {}), dict(client.metrics)
            try:
                expected = answer_layout(
                    kind, architecture, self.settings, self.state.population, metrics, self.tree.image_shape
                )
            except ValueError as error:
                raise WireError(report.edge, f"an answer of {client.client}: {error}") from error
            if fault := expected.difference(expected.in_order(Layout.of(own))):
                raise WireError(report.edge, f"an answer of {client.client}: {fault}")
            tensors = {n.partition("/")[2]: a for n, a in own.items()}
            found[client.client] = Answer({"loss": client.loss, **metrics}, tensors)
        return found

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        """Ask nobody: the cloud measures, and clients are asked by `ask`."""
        return iter(())

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing."""
        return None


#: How often a window is sent, or a question put, before a reproducible run that lacks somebody's part is ended.
TRIES = 3
#: Questions whose answers are only reported.
MEASURES = frozenset({"accuracy", "samples"})
