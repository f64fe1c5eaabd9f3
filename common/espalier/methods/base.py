"""A method: one federated algorithm seen from all three tiers (DESIGN §4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from espalier.config.run_config import FlatValue, RunConfig
from espalier.methods.planning import AtRandom, ByHomogeneity, EdgeChoice, Fixed, Member
from espalier.methods.selection import Selection, create_selection
from espalier.methods.state import CloudState, ServerState, architecture_layout, build_model
from espalier.methods.tally import Arrays, Tally
from espalier.methods.updates import Deployed, Inquiry, Update
from espalier.wire.payload import Layout, TensorSpec, Weights
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from torch import Tensor, nn

    from espalier.data.imageset import ImageSet
    from espalier.methods.views import Sent
    from espalier.training.objectives import LocalRound, Objective

__all__ = ["CloudState", "Deployed", "Inquiry", "Method", "ServerState", "Update", "build_model"]


class Method:
    """One algorithm; the subclasses read like their papers' boxes.

    Tier code calls the parts below and knows no method by name. The module of a method imports
    without torch, because an edge only adds up; what trains is imported where it is used.

    Parameters
    ----------
    settings : RunConfig
        The run's configuration.
    """

    #: Name in `-c method=…`.
    name: ClassVar[str]
    #: What it trains: "diffusion", "classification".
    tasks: ClassVar[tuple[str, ...]] = ("diffusion", "classification")
    #: Architecture families it trains; empty: any.
    families: ClassVar[tuple[str, ...]] = ()
    #: Whether clients train sub-models by `levels`, and whether there is one global model.
    has_levels: ClassVar[bool] = False
    #: Whether every client keeps a network of its own kind, which no server holds.
    own_models: ClassVar[bool] = False
    has_one_model: ClassVar[bool] = True
    #: The rules behind `edge-choice=auto`, `selection=auto`, `codec=auto`, `weighting=auto` and
    #: `optimizer=auto` ("": as selection and task say).
    own_edge_choice: ClassVar[str] = "random"
    own_selection: ClassVar[str] = "uniform"
    own_codec: ClassVar[str] = "none"
    own_weighting: ClassVar[str] = ""
    own_optimizer: ClassVar[str] = ""
    #: Sections that servers keep from clients, and those that shrink as 1/N when clients join.
    server_sections: ClassVar[frozenset[str]] = frozenset()
    mean_sections: ClassVar[frozenset[str]] = frozenset()
    #: Whether the cloud merges only the edges whose last round is the window's newest one that counted.
    newest_only: ClassVar[bool] = False
    #: Whether a client stays at one edge for a window, because a round builds on what its last one kept:
    #: between edges the order of a client's rounds is not sure.
    settled: ClassVar[bool] = False
    #: Whether the local loss is a mean over images, each by itself, and terms that no image enters: what DP-SGD
    #: needs; and what a client tells of its images beside the difference it made to what it received, of
    #: which noise on that difference hides nothing ("": nothing).
    sample_wise: ClassVar[bool] = False
    tells: ClassVar[str] = ""

    def __init__(self, settings: RunConfig) -> None:
        self.settings = settings

    # --- what the settings leave to the method -------------------------------------------------------

    @classmethod
    def contradictions(cls, settings: RunConfig) -> list[str]:
        """Return the faults of a configuration that only this method sees, one line each, key first."""
        return []

    @classmethod
    def by_rounds(cls, settings: RunConfig) -> dict[str, FlatValue]:
        """Return the settings whose default hangs on `rounds`, by flat key, with what they mean.

        A resume with more rounds leaves them as they were.
        """
        return {}

    @classmethod
    def chosen(cls, settings: RunConfig, axis: str) -> str:
        """Return a setting (`selection`, `codec`, `edge_choice`, `weighting`) with "auto" resolved."""
        value: str = getattr(settings, axis)
        own: str = getattr(cls, f"own_{axis}")
        return own if value == "auto" else value

    def selection(self) -> Selection:
        """Return the rule by which the clients of a round are picked."""
        return create_selection(self.settings, self.chosen(self.settings, "selection"))

    def edge_choice(self) -> EdgeChoice:
        """Return the rule by which a client gets its edge."""
        from espalier.methods.shape import ByShape

        s = self.settings
        rules: dict[str, Callable[[], EdgeChoice]] = {
            "homogeneity": lambda: ByHomogeneity(s.selection_a, s.selection_b, s.homogeneity_form),
            "random": AtRandom,
            "fixed": Fixed,
            "shape": lambda: ByShape(s.shape_diversity, s.shape_edges, s.rg),
        }
        return rules[self.chosen(s, "edge_choice")]()

    # --- cloud, before a round ---------------------------------------------------------------------

    def meet(self, image_shape: tuple[int, int, int], classes: int) -> None:
        """Take note, at the cloud, of the clients' images (channels, height, width) and number of classes."""
        self.image_shape, self.classes = image_shape, classes

    def initial_state(self) -> CloudState:
        """Return the cloud's state at the start, before `before_run`."""
        state = CloudState(pb.ArchitectureSpec(), Weights.pack({}))
        state.adopt(self.initial(self.image_shape, self.classes))
        return state

    def initial(self, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return the network that the run starts from, by the run's seed alone.

        Parameters
        ----------
        image_shape : tuple of int
            Channels, height, width.
        classes : int
            Number of classes.
        """
        from espalier.models.initial import initial_model

        return initial_model(self.settings, image_shape, classes)

    def before_run(self, state: CloudState, ask: Inquiry) -> None:
        """Change the initial state; called once, before the first window."""

    def assign(
        self, state: CloudState, picked: Sequence[str], members: Mapping[str, Member], round_: int
    ) -> dict[str, str]:
        """Return the key of the view each client is given in a round; nothing said means the whole."""
        return {}

    def view(self, state: CloudState, key: str) -> pb.View:
        """Return what the clients of a key are given of the server's tensors."""
        raise KeyError(key)

    # --- client, every round -----------------------------------------------------------------------

    def objective(self, round_: int) -> Objective:
        """Return what a client minimises in a round."""
        from espalier.tasks.base import base_objective

        return base_objective(self.settings)

    def client_objective(self, round_: int) -> Objective:
        """Return what a client minimises and reports: the method's, and what the selection wants to know."""
        if self.selection().reports != "gradient":
            return self.objective(round_)
        from espalier.training.received_model import ReceivedGradient

        return self.objective(round_) + ReceivedGradient()

    def data(self, local: LocalRound) -> ImageSet:
        """Return the images that a client trains on."""
        assert local.data is not None
        return local.data

    def network(self, local: LocalRound, architecture: pb.ArchitectureSpec) -> nn.Module:
        """Return the network that a client trains or answers about; `local.received` becomes its tensors.

        After a training it may go back to `espalier.models.model_cache`, so nothing may hold on to it past the round.

        Raises
        ------
        ValueError
            If it cannot be built.
        """
        from espalier.models.model_cache import lend

        local.received = self.start(local)
        # `lend` copies, so training does not write into what was received.
        return lend(architecture, dict(local.received))

    def objective_for(self, local: LocalRound) -> Objective:
        """Return the objective of a round in which the client was sent something that belongs to it."""
        return self.client_objective(local.round)

    def predictor(self, model: nn.Module, classes: int) -> nn.Module:
        """Return what answers with a score per class, for a network of this method."""
        return model

    def pictures(self, state: CloudState) -> np.ndarray | None:
        """Return images worth looking at after a window, float32 [n, C, H, W] in [-1, 1]; None for none."""
        return None

    def start(self, local: LocalRound) -> Mapping[str, Tensor]:
        """Return the tensors of the network that a client trains from, by name."""
        return local.received

    def publish(self, trained: dict[str, np.ndarray], local: LocalRound) -> dict[str, np.ndarray]:
        """Return what of a trained network leaves the client; what stays goes into `local.state`."""
        return trained

    def returned(self, sent: Layout, names: Sequence[str], metrics: Mapping[str, float]) -> Layout:
        """Return the layout of a client's reply before the codec; client and edge both ask.

        Parameters
        ----------
        sent : Layout
            What the client was sent.
        names : sequence of str
            The tensors that the plan wants back.
        metrics : Mapping[str, float]
            Scalars of the client's report.

        Raises
        ------
        ValueError
            If the metrics make no sense, e.g. a cluster that does not exist.
        """
        return sent.only(names)

    def reply_layout(
        self, architecture: pb.ArchitectureSpec, sent: Layout, names: Sequence[str], report: pb.ClientReport
    ) -> Layout:
        """Return the layout of a client's whole reply: what the method returns, and what the selection wants.

        Raises
        ------
        ValueError
            If the report makes no sense.
        """
        layout = self.returned(sent, names, dict(report.metrics))
        if self.selection().reports == "gradient":
            layout = Layout((*layout.tensors, *trained_layout(architecture, "gradient").tensors))
        return layout

    def describe_reply(self, objective: Objective, model: nn.Module, report: pb.ClientReport) -> None:
        """Say in a client's report what the tensors of its reply stand for, where their names do not."""

    # --- edge and cloud ----------------------------------------------------------------------------

    def weight_of(self, update: Update) -> float:
        """Return a client's weight in a mean: n_k, or 1 where the sampling went by n_k already."""
        rule = self.chosen(self.settings, "weighting") or self.selection().weighting
        return float(update.samples) if rule == "samples" else 1.0

    def cut(self, key: str, view: pb.View, server: ServerState) -> Sent:
        """Cut a view out of a server's tensors; raises WireError where it does not fit."""
        from espalier.methods.views import slice_view

        return slice_view(view, server, "cloud")

    def add(self, tally: Tally, update: Update, server: ServerState) -> None:
        """Add a client's reply to a server's sums; what is none of the server's tensors is passed on.

        Raises
        ------
        ValueError
            If something in it does not fit.
        """
        self.contribute(tally, update, server)
        if update.extra:
            tally.forward(update.name, update.extra)

    def contribute(self, tally: Tally, update: Update, server: ServerState) -> None:
        """Add what a client sent to a server's sums."""
        tally.mean(update.arrays, self.weight_of(update))

    def check_passed(self, stacks: Mapping[str, Arrays], rows: Arrays, server: ServerState) -> None:
        """Look at what an edge passes on beside its sums before the cloud takes it.

        Parameters
        ----------
        stacks : mapping of str to mapping of str to array
            Forwarded tensors by client.
        rows : mapping of str to array
            Stacked rows.
        server : ServerState
            The cloud's state.

        Raises
        ------
        ValueError
            If a step could not be taken over it. By default, if there are rows, or gradients that are none of the
            network.
        """
        if rows:
            raise ValueError(f"rows {sorted(rows)[:3]}, which nobody asked for")
        head = "gradient/"
        known = {head + t.name: t for t in server.architecture.tensors}
        for client, stack in stacks.items():
            for name, array in stack.items():
                if not name.startswith(head):
                    continue
                spec = known.get(name)
                fits = spec is not None and array.ndim == len(spec.shape) and array.dtype.kind == "f"
                if not fits or any(
                    n > m for n, m in zip(array.shape, spec.shape if spec else (), strict=False)
                ):
                    raise ValueError(f"{name!r} of {client}, which is no gradient of the network")

    def step(self, server: ServerState, tally: Tally) -> None:
        """Move a server's tensors on: an edge's between its rounds, the cloud's after a window."""
        server.assign(tally.means(server.tensors))

    def gather(self, window: Tally, later: Tally) -> Tally:
        """Return an edge's sums of a window after one more round of it; they are what it reports."""
        window.extend(later)
        return window

    # --- cloud, after a window ---------------------------------------------------------------------

    def edge_share(self, samples: float, last_samples: float, labels: np.ndarray) -> float | None:
        """Return an edge's weight at the cloud before normalisation; None: as its clients weigh.

        Edges of share 0 count only if every edge's share is 0.
        """
        return None

    def central_step(self, state: CloudState, tally: Tally) -> None:
        """Move the global state on."""
        self.step(state, tally)

    def after_window(self, state: CloudState) -> None:
        """Change the state after a central aggregation."""

    def deployed(self, state: CloudState, ask: Inquiry) -> list[Deployed]:
        """Return the networks that are evaluated and kept, the foremost first."""
        weights = state.weights if state.ema is None else state.ema
        return [Deployed("global", state.architecture, weights)]


def trained_layout(architecture: pb.ArchitectureSpec, section: str = "") -> Layout:
    """Return the layout of the trained tensors of a network, their names behind a section's."""
    whole = architecture_layout(architecture)
    buffers = {t.name for t in architecture.tensors if t.buffer}
    head = f"{section}/" if section else ""
    return Layout(
        tuple(TensorSpec(head + t.name, t.dtype, t.shape) for t in whole.tensors if t.name not in buffers)
    )
