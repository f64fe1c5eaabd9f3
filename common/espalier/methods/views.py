"""Views: the part of a server's tensors that a client receives, and the layouts of answers to inquiries."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.json_format import MessageToDict

from espalier.config.run_settings import RunSettings
from espalier.errors import WireError
from espalier.methods.faug import SEEDS, seeds_layout
from espalier.methods.state import ServerState, trained_layout
from espalier.tasks.diffusion_settings import DiffusionSettings
from espalier.wire.payload import Layout, TensorSpec
from espalier.wire.sections import (
    GRADIENT,
    MODEL,
    Layouts,
    Payload,
    SectionId,
    Sections,
    layouts_from_proto,
)
from espalier_proto import espalier_pb2 as pb

#: Inquiries to clients besides training; :func:`answer_layouts` gives the sections of their answers.
INQUIRIES = ("loss", "batch-loss", "gradient", "accuracy", "statistics", "samples", "seeds", "fill")
#: Sections of answers, and the tensor of generated images.
STATISTICS, SAMPLES = SectionId("statistics"), SectionId("samples")
IMAGES = "images"


@dataclass(frozen=True)
class ClientView:
    """A client's part of a server's tensors.

    Attributes
    ----------
    architecture : pb.ArchitectureSpec
        The client's network.
    payload : Payload
        The sections that are sent to the client.
    sources : dict[str, SectionId]
        For tensors of its network that are not in the server's `MODEL`: the server's section that contains them.
    returns : tuple[str, ...]
        Tensors of its network that the client sends back.
    coded : Payload, optional
        `payload` as encoded by the downlink codec, if there is one.
    """

    architecture: pb.ArchitectureSpec
    payload: Payload
    sources: dict[str, SectionId]
    returns: tuple[str, ...]
    coded: Payload | None = None

    def at_server(self, sections: Sections) -> dict[SectionId, dict[str, np.ndarray]]:
        """Map a client's tensors to the server's sections."""
        found: dict[SectionId, dict[str, np.ndarray]] = {}
        for section, arrays in sections.items():
            for name, array in arrays.items():
                source = self.sources.get(name, section) if section == MODEL else section
                found.setdefault(source, {})[name] = array
        return found


def whole_view(server: ServerState, hidden: Collection[str]) -> ClientView:
    """Return all sections of a server except hidden ones.

    Parameters
    ----------
    server : ServerState
        The server.
    hidden : collection of str
        Names of sections that are not sent, a method's `server_sections`.
    """
    payload = server.payload.only(section for section in server.payload if section.name not in hidden)
    returns = tuple(t.name for t in server.architecture.tensors)
    return ClientView(server.architecture, payload, {}, returns)


def slice_view(view: pb.View, server: ServerState, sender: str) -> ClientView:
    """Return the leading slices of a server's tensors that a view describes.

    Raises
    ------
    WireError
        If the server does not have a tensor of the view, or has a smaller one.
    """
    layouts = (
        layouts_from_proto(view.sections, sender)
        if view.sections
        else {MODEL: Layout.from_proto(view.architecture.tensors, sender)}
    )
    sources = {name: SectionId(source.name, source.member) for name, source in view.sources.items()}
    server_tensors = server.payload.views()
    parts: dict[SectionId, dict[str, np.ndarray]] = {}
    for section, layout in layouts.items():
        parts[section] = {}
        for spec in layout.tensors:
            source = sources.get(spec.name, section) if section == MODEL else section
            whole = server_tensors.get(source, {}).get(spec.name)
            if whole is None or len(whole.shape) != len(spec.shape) or not _fits(spec, whole):
                raise WireError(
                    sender,
                    f"a view with tensor {spec.name!r}{list(spec.shape)}, which is not a slice of the server's",
                )
            parts[section][spec.name] = whole[tuple(slice(0, n) for n in spec.shape)]
    network = parts.get(MODEL, {})
    returns = tuple(view.returns) or tuple(t.name for t in view.architecture.tensors if t.name in network)
    return ClientView(view.architecture, Payload.fill(layouts, parts), sources, returns)


def _fits(spec: TensorSpec, whole: np.ndarray) -> bool:
    return all(a <= b for a, b in zip(spec.shape, whole.shape, strict=True))


def buffers_of(architecture: pb.ArchitectureSpec) -> frozenset[str]:
    """Return the names of a network's tensors that are not trained."""
    return frozenset(t.name for t in architecture.tensors if t.buffer)


def answer_layouts(
    kind: str,
    architecture: pb.ArchitectureSpec,
    settings: RunSettings,
    population: int,
    metrics: Mapping[str, float] | None = None,
    image_shape: Sequence[int] = (),
) -> Layouts:
    """Return the sections of the answer to an inquiry.

    Parameters
    ----------
    kind : str
        One of `INQUIRIES`.
    architecture : pb.ArchitectureSpec
        The network that the inquiry is about.
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
        return {GRADIENT: trained_layout(architecture)}
    if kind == "seeds":
        return {SEEDS: seeds_layout(metrics or {}, image_shape)}
    if kind == "samples":
        # Together the clients generate as many images as the cloud would.
        config = MessageToDict(architecture.config)
        if "sample_size" not in config:
            raise ValueError(f"samples of a {architecture.family} network, which generates no images")
        size = int(config["sample_size"])
        count = max(1, math.ceil(settings.of(DiffusionSettings).eval_samples / max(population, 1)))
        shape = (count, int(config["in_channels"]), size, size)
        return {SAMPLES: Layout((TensorSpec(IMAGES, "uint8", shape),))}
    if kind == "statistics":
        norms = [t for t in architecture.tensors if len(t.shape) == 1 and t.name.endswith(".weight")]
        paths = [(t.name.removesuffix(".weight"), tuple(t.shape)) for t in norms]
        tensors = (
            TensorSpec(f"{path}.{part}", "float32", shape if part != "count" else ())
            for path, shape in paths
            for part in ("mean", "var", "count")
        )
        return {STATISTICS: Layout(tuple(tensors))}
    return {}
