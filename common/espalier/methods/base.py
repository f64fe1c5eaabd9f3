"""The base class of methods: one federated algorithm with its parts at clients, edges and the cloud."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from espalier import models
from espalier.config.fields import FlatValue
from espalier.config.run_settings import Groups, RunSettings
from espalier.methods.aggregate import Aggregate, Arrays, Forwarded
from espalier.methods.homogeneity import ScoreSettings
from espalier.methods.planning import AtRandom, ByHomogeneity, EdgeChoice, Fixed, HomogeneitySettings, Member
from espalier.methods.selection import Selection, create_selection
from espalier.methods.shape import ByShape, ShapeSettings
from espalier.methods.state import CloudState, ServerState, build_model, trained_layout
from espalier.methods.updates import Deployed, Inquiry, Update
from espalier.methods.views import ClientView, slice_view
from espalier.tasks.base import base_objective
from espalier.training.objectives import LocalRound, Objective
from espalier.wire.payload import Layout
from espalier.wire.sections import GRADIENT, MODEL, Layouts, Payload, SectionId
from espalier_proto import espalier_pb2 as pb

if TYPE_CHECKING:
    from torch import Tensor, nn

    from espalier.data.imageset import ImageSet

__all__ = ["CloudState", "Deployed", "Inquiry", "Method", "ServerState", "Update", "build_model"]


class Method:
    """One algorithm; a subclass overrides what differs from FedAvg, in the order of its paper's algorithm.

    Code of the tiers calls the hooks below and knows no method by name. The module of a method imports without torch,
    because edges, which aggregate in NumPy, import it: see :mod:`espalier.methods`.

    Parameters
    ----------
    settings : RunSettings
        The run's configuration.
    """

    #: Name in `-c method=…`.
    name: ClassVar[str]
    #: Groups of settings that the method reads, beyond those of every run: its own `Settings` and shared ones.
    uses: ClassVar[Groups] = ()
    #: Tasks it supports: "diffusion", "classification".
    tasks: ClassVar[tuple[str, ...]] = ("diffusion", "classification")
    #: Architecture families it supports; empty: any.
    families: ClassVar[tuple[str, ...]] = ()
    #: Whether clients train sub-models by `levels`, and whether there is one global model.
    has_levels: ClassVar[bool] = False
    #: Whether every client has a network of its own architecture, which no server stores.
    own_models: ClassVar[bool] = False
    has_one_model: ClassVar[bool] = True
    #: The meaning of `edge-choice=auto`, `selection=auto`, `codec=auto`, `weighting=auto` and `optimizer=auto`
    #: ("": the selection's weighting, the task's optimiser).
    own_edge_choice: ClassVar[str] = "random"
    own_selection: ClassVar[str] = "uniform"
    own_codec: ClassVar[str] = "none"
    own_weighting: ClassVar[str] = ""
    own_optimizer: ClassVar[str] = ""
    #: Names of sections that are not sent to clients, and those that are scaled by 1/N when clients join.
    server_sections: ClassVar[frozenset[str]] = frozenset()
    mean_sections: ClassVar[frozenset[str]] = frozenset()
    #: Whether the cloud merges only edges whose last round is the window's newest aggregated one.
    newest_only: ClassVar[bool] = False
    #: Whether a client stays at one edge for a window, because a round depends on the state of its previous one:
    #: edges do not wait for each other, so rounds at different edges have no fixed order.
    sticky_edge: ClassVar[bool] = False
    #: Whether the local loss is a mean of independent per-image losses plus terms that depend on no image, as DP-SGD
    #: requires.
    per_example_loss: ClassVar[bool] = False
    #: What a client discloses about its images in addition to its model update, and noise on the update does not
    #: protect ("": nothing).
    extra_disclosure: ClassVar[str] = ""

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings

    # --- settings --------------------------------------------------------------------------------------

    @classmethod
    def contradictions(cls, settings: RunSettings) -> list[str]:
        """Return the faults of a configuration that are specific to this method, one line each, key first."""
        return []

    @classmethod
    def defaults_by_rounds(cls, settings: RunSettings) -> dict[str, FlatValue]:
        """Return the resolved values of settings whose default depends on `rounds`, by flat key.

        A resume with more rounds does not change them.
        """
        return {}

    @classmethod
    def chosen(cls, settings: RunSettings, axis: str) -> str:
        """Return a setting (`selection`, `codec`, `edge_choice`, `weighting`) with "auto" resolved."""
        value = str(settings.value(axis))
        own: str = getattr(cls, f"own_{axis}")
        return own if value == "auto" else value

    def selection(self) -> Selection:
        """Return the rule that chooses the participants of a round."""
        return create_selection(self.settings, self.chosen(self.settings, "selection"))

    def edge_choice(self) -> EdgeChoice:
        """Return the rule that assigns clients to edges."""
        s = self.settings
        rules: dict[str, Callable[[], EdgeChoice]] = {
            "homogeneity": lambda: ByHomogeneity(
                s.of(HomogeneitySettings).selection_a,
                s.of(HomogeneitySettings).selection_b,
                s.of(ScoreSettings).homogeneity_form,
            ),
            "random": AtRandom,
            "fixed": Fixed,
            "shape": lambda: ByShape(
                s.of(ShapeSettings).shape_diversity, s.of(ShapeSettings).shape_edges, s.rg
            ),
        }
        return rules[self.chosen(s, "edge_choice")]()

    # --- cloud, before a round ---------------------------------------------------------------------

    def set_data_shape(self, image_shape: tuple[int, int, int], classes: int) -> None:
        """Set, at the cloud, the shape (channels, height, width) of the clients' images and the number of classes."""
        self.image_shape, self.classes = image_shape, classes

    def initial_state(self) -> CloudState:
        """Return the cloud's initial state, before `before_run`."""
        state = CloudState(pb.ArchitectureSpec(), Payload({}))
        state.adopt(self.initial(self.image_shape, self.classes))
        return state

    def initial(self, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """Return the initial network, which depends on the run's seed alone.

        Parameters
        ----------
        image_shape : tuple of int
            Channels, height, width.
        classes : int
            Number of classes.
        """
        return models.initial_model(self.settings, image_shape, classes)

    def before_run(self, state: CloudState, ask: Inquiry) -> None:
        """Change the initial state; called once, before the first window."""

    def assign(
        self, state: CloudState, picked: Sequence[str], members: Mapping[str, Member], round_: int
    ) -> dict[str, str]:
        """Return the key of each client's view in a round; a client without a key gets the whole model."""
        return {}

    def view(self, state: CloudState, key: str) -> pb.View:
        """Return the part of the server's tensors that clients of a key receive."""
        raise KeyError(key)

    # --- client, every round -----------------------------------------------------------------------

    def objective(self, round_: int) -> Objective:
        """Return what a client minimises in a round; by default the task's loss."""
        return base_objective(self.settings)

    def client_objective(self, round_: int) -> Objective:
        """Return the method's objective, with the selection's measurement if it has one."""
        measurement = self.selection().measurement()
        objective = self.objective(round_)
        return objective if measurement is None else objective + measurement

    def data(self, local: LocalRound) -> ImageSet:
        """Return the images that a client trains on."""
        assert local.data is not None
        return local.data

    def network(self, local: LocalRound, architecture: pb.ArchitectureSpec) -> nn.Module:
        """Return the network that a client trains or evaluates; sets `local.received` to its tensors.

        After the training `espalier.models.model_cache` may reuse it, so it must not be referenced after the round.

        Raises
        ------
        ValueError
            If it cannot be built.
        """
        local.received = self.start(local)
        # `acquire` copies, so training does not modify the received tensors.
        return models.acquire(architecture, dict(local.received))

    def objective_for(self, local: LocalRound) -> Objective:
        """Return the objective of a round for this client, which may depend on what it received."""
        return self.client_objective(local.round)

    def predictor(self, model: nn.Module, classes: int) -> nn.Module:
        """Return a network that outputs a score per class, for a network of this method."""
        return model

    def pictures(self, state: CloudState) -> np.ndarray | None:
        """Return images to show after a window, float32 [n, C, H, W] in [-1, 1]; None for none."""
        return None

    def start(self, local: LocalRound) -> Mapping[str, Tensor]:
        """Return the tensors from which a client starts training, by name."""
        return local.received

    def publish(
        self, trained: dict[str, np.ndarray], local: LocalRound
    ) -> dict[SectionId, dict[str, np.ndarray]]:
        """Return the tensors of a trained network to send, by section; store the others in `local.state`."""
        return {MODEL: trained}

    def returned(self, sent: Layouts, names: Sequence[str], metrics: Mapping[str, float]) -> Layouts:
        """Return the sections of a client's reply before the codec; called by client and edge.

        Parameters
        ----------
        sent : mapping of SectionId to Layout
            Layouts of what the client received.
        names : sequence of str
            The tensors of the network that the plan requests.
        metrics : Mapping[str, float]
            Scalars of the client's report.

        Raises
        ------
        ValueError
            If the metrics are invalid, e.g. a cluster that does not exist.
        """
        return {MODEL: sent.get(MODEL, Layout(())).only(names)}

    def reply_layouts(
        self, architecture: pb.ArchitectureSpec, sent: Layouts, names: Sequence[str], report: pb.ClientReport
    ) -> Layouts:
        """Return the sections of a client's whole reply: the method's and the selection's.

        Raises
        ------
        ValueError
            If the report is invalid.
        """
        layouts = self.returned(sent, names, dict(report.metrics))
        if self.selection().reports == "gradient":
            layouts = {**layouts, GRADIENT: trained_layout(architecture)}
        return layouts

    def describe_reply(self, objective: Objective, model: nn.Module, report: pb.ClientReport) -> None:
        """Add to a client's report what the names of the reply's tensors do not say, e.g. their classes."""

    # --- edge and cloud ----------------------------------------------------------------------------

    def weight_of(self, update: Update) -> float:
        """Return a client's weight in a mean: n_k, or 1 if clients were sampled ∝ n_k."""
        rule = self.chosen(self.settings, "weighting") or self.selection().weighting
        return float(update.samples) if rule == "samples" else 1.0

    def cut(self, key: str, view: pb.View, server: ServerState) -> ClientView:
        """Return a view's part of a server's tensors; raises WireError if the view does not fit."""
        return slice_view(view, server, "cloud")

    def add(self, aggregate: Aggregate, update: Update, server: ServerState) -> None:
        """Add a client's reply to a server's sums, and forward sections that the server does not have.

        Raises
        ------
        ValueError
            If something in it does not fit.
        """
        self.contribute(aggregate, update, server)
        if update.extra:
            aggregate.forward(update.name, update.extra)

    def contribute(self, aggregate: Aggregate, update: Update, server: ServerState) -> None:
        """Add a client's tensors to a server's sums."""
        aggregate.mean(update.sections, self.weight_of(update))

    def check_forwarded(self, forwarded: Mapping[str, Forwarded], rows: Arrays, server: ServerState) -> None:
        """Check what an edge forwards in addition to its sums, before the cloud uses it.

        Parameters
        ----------
        forwarded : mapping of str to mapping of SectionId to mapping of str to array
            Forwarded tensors by client and section.
        rows : mapping of str to array
            Stacked rows.
        server : ServerState
            The cloud's state.

        Raises
        ------
        ValueError
            If a step cannot use it. By default, if there are rows, or gradients that do not fit the network.
        """
        if rows:
            raise ValueError(f"rows {sorted(rows)[:3]}, which were not requested")
        known = {t.name: t for t in server.architecture.tensors}
        for client, sections in forwarded.items():
            for name, array in sections.get(GRADIENT, {}).items():
                spec = known.get(name)
                fits = spec is not None and array.ndim == len(spec.shape) and array.dtype.kind == "f"
                if not fits or any(
                    n > m for n, m in zip(array.shape, spec.shape if spec else (), strict=False)
                ):
                    raise ValueError(f"{name!r} of {client}, which is not a gradient of the network")

    def step(self, server: ServerState, aggregate: Aggregate) -> None:
        """Update a server's tensors: an edge's between its rounds, the cloud's after a window."""
        server.assign(aggregate.means(server.payload.views()))

    def gather(self, window: Aggregate, later: Aggregate) -> Aggregate:
        """Merge a round's sums into an edge's sums of the window, which it reports."""
        window.extend(later)
        return window

    # --- cloud, after a window ---------------------------------------------------------------------

    def edge_share(self, samples: float, last_samples: float, labels: np.ndarray) -> float | None:
        """Return an edge's weight at the cloud before normalisation; None: the sum of its clients' weights.

        Edges with a share of 0 are included only if all shares are 0.
        """
        return None

    def central_step(self, state: CloudState, aggregate: Aggregate) -> None:
        """Update the global state."""
        self.step(state, aggregate)

    def after_window(self, state: CloudState) -> None:
        """Change the state after a central aggregation."""

    def deployed(self, state: CloudState, ask: Inquiry) -> list[Deployed]:
        """Return the networks to evaluate and store, the main one first."""
        weights = state.weights if state.ema is None else state.ema
        return [Deployed("global", state.architecture, weights)]
