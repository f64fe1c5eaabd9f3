"""Views: the part of a server's tensors that a client receives, and the layouts of answers to inquiries."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.json_format import MessageToDict

from espalier.config.run_settings import RunSettings
from espalier.errors import WireError
from espalier.methods.faug import seeds_layout
from espalier.methods.state import ServerState, trained_layout
from espalier.tasks.diffusion_settings import DiffusionSettings
from espalier.wire.payload import Layout, TensorSpec, Weights
from espalier_proto import espalier_pb2 as pb

#: Inquiries to clients besides training; :func:`answer_layout` gives the tensors of their answers.
INQUIRIES = ("loss", "batch-loss", "gradient", "accuracy", "statistics", "samples", "seeds", "fill")


@dataclass(frozen=True)
class Sent:
    """A client's part of a server's tensors.

    Attributes
    ----------
    architecture : pb.ArchitectureSpec
        The client's network.
    weights : Weights
        What it is sent, under its own names.
    sources : dict[str, str]
        Its names -> the server's, where they differ.
    returns : tuple[str, ...]
        Names that come back.
    coded : Weights, optional
        `weights` as they lie on the link, where that is another form.
    """

    architecture: pb.ArchitectureSpec
    weights: Weights
    sources: dict[str, str]
    returns: tuple[str, ...]
    coded: Weights | None = None

    def at_server(self, name: str) -> str:
        """Return the server's name of a client's tensor."""
        return self.sources.get(name, name)


def whole_view(server: ServerState, hidden: Collection[str]) -> Sent:
    """Return all tensors of a server except hidden sections.

    Parameters
    ----------
    server : ServerState
        The server.
    hidden : collection of str
        Sections that are not sent, a method's `server_sections`.
    """
    own = server.weights
    visible = [t.name for t in own.layout.tensors if t.name.partition("/")[0] not in hidden]
    if len(visible) < len(own.layout.tensors):
        views = own.views()
        own = Weights.fill(own.layout.only(visible), {n: views[n] for n in visible})
    returns = tuple(t.name for t in server.architecture.tensors)
    return Sent(server.architecture, own, {}, returns)


def slice_view(view: pb.View, server: ServerState, sender: str) -> Sent:
    """Return the leading slices of a server's tensors that a view describes.

    Raises
    ------
    WireError
        If the view has a tensor that the server does not have, or a larger one.
    """
    specs = view.layout.tensors if view.HasField("layout") else view.architecture.tensors
    layout, tensors = Layout.from_proto(specs, sender), server.tensors
    sources = dict(view.sources)
    parts: dict[str, np.ndarray] = {}
    for spec in layout.tensors:
        whole = tensors.get(sources.get(spec.name, spec.name))
        if whole is None or len(whole.shape) != len(spec.shape) or not _fits(spec, whole):
            raise WireError(
                sender,
                f"a view with tensor {spec.name!r}{list(spec.shape)}, which is no slice of the server's",
            )
        parts[spec.name] = whole[tuple(slice(0, n) for n in spec.shape)]
    returns = tuple(view.returns) or tuple(t.name for t in view.architecture.tensors if t.name in parts)
    return Sent(view.architecture, Weights.fill(layout, parts), sources, returns)


def _fits(spec: TensorSpec, whole: np.ndarray) -> bool:
    return all(a <= b for a, b in zip(spec.shape, whole.shape, strict=True))


def buffers_of(architecture: pb.ArchitectureSpec) -> frozenset[str]:
    """Return the names of a network's tensors that are not trained."""
    return frozenset(t.name for t in architecture.tensors if t.buffer)


def answer_layout(
    kind: str,
    architecture: pb.ArchitectureSpec,
    settings: RunSettings,
    population: int,
    metrics: Mapping[str, float] | None = None,
    image_shape: Sequence[int] = (),
) -> Layout:
    """Return the layout of the answer to an inquiry.

    Parameters
    ----------
    kind : str
        One of `INQUIRIES`.
    architecture : pb.ArchitectureSpec
        The network asked about.
    settings : RunSettings
        The run's configuration.
    population : int
        Clients in the run (N).
    metrics : mapping of str to float, optional
        Scalars of the answer, on which its size may depend.
    image_shape : sequence of int
        Channels, height and width of the clients' images.

    Raises
    ------
    ValueError
        If the inquiry is unknown.
    """
    if kind not in INQUIRIES:
        raise ValueError(f"the inquiry {kind!r} is unknown; known are {', '.join(INQUIRIES)}")
    if kind == "gradient":
        return trained_layout(architecture, "gradient")
    if kind == "seeds":
        return seeds_layout(metrics or {}, image_shape, settings)
    if kind == "samples":
        # Generated images, as many as the cloud would generate with the whole network.
        config = MessageToDict(architecture.config)
        if "sample_size" not in config:
            raise ValueError(f"samples of a {architecture.family} network, which generates no images")
        size = int(config["sample_size"])
        count = max(1, math.ceil(settings.of(DiffusionSettings).eval_samples / max(population, 1)))
        return Layout(
            (TensorSpec("samples/images", "uint8", (count, int(config["in_channels"]), size, size)),)
        )
    if kind == "statistics":
        norms = [t for t in architecture.tensors if len(t.shape) == 1 and t.name.endswith(".weight")]
        paths = [(t.name.removesuffix(".weight"), tuple(t.shape)) for t in norms]
        return Layout(
            tuple(
                TensorSpec(f"statistics/{path}.{part}", "float32", shape if part != "count" else ())
                for path, shape in paths
                for part in ("mean", "var", "count")
            )
        )
    return Layout(())
