"""Reads checkpoints of schema 1, in which the names of sections were prefixes of the tensors' names."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from espalier.wire.payload import Layout, TensorSpec
from espalier.wire.sections import MODEL, SectionId

#: Prefixes of the state's tensors, each with the name and the member of its section.
_STATE = (
    (re.compile(r"(control|dyn|head|table|pairs|handout|limit)/"), r"\1", ""),
    (re.compile(r"cluster(\d+)/"), "cluster", r"\1"),
    (re.compile(r"depth(\d+)/"), "depth", r"\1"),
    (re.compile(r"(own|next)/depth(\d+)/"), r"\1", r"\2"),
    (re.compile(r"p([\d.e+-]+)/"), "width", r"\1"),
    (re.compile(r"peer/([^/]+)/"), "peer", r"\1"),
)
#: The same for the tensors that the method and the selection stored at the cloud.
_MEMORY = (
    (re.compile(r"cluster/"), "membership", ""),
    (re.compile(r"given/"), "given", ""),
    (re.compile(r"transformer/"), "transformer", ""),
    (re.compile(r"selection/(loss|gradient)/"), "selection", r"\1"),
    (re.compile(r"selection/(?=size$)"), "selection", "size"),
)

Arrays = dict[SectionId, dict[str, np.ndarray]]


def from_schema_1(
    layout: Layout, tensors: Mapping[str, np.ndarray]
) -> tuple[dict[SectionId, Layout], Arrays, Arrays]:
    """Sort the tensors of a checkpoint of schema 1 into sections.

    Parameters
    ----------
    layout : Layout
        The checkpoint's layout of the state's tensors, with sections as prefixes.
    tensors : mapping of str to array
        The checkpoint's tensors: "model/NAME" for the state, "extra/NAME" for the method and the selection.

    Returns
    -------
    dict of SectionId to Layout
        Layouts of the state's sections.
    dict of SectionId to dict of str to array
        The state's sections.
    dict of SectionId to dict of str to array
        The tensors that the method and the selection stored at the cloud.
    """
    specs: dict[SectionId, list[TensorSpec]] = {}
    arrays: Arrays = {}
    for spec in layout.tensors:
        section, name = _sorted(spec.name, _STATE)
        specs.setdefault(section, []).append(TensorSpec(name, spec.dtype, spec.shape))
        arrays.setdefault(section, {})[name] = tensors["model/" + spec.name]
    memory: Arrays = {}
    for key, array in tensors.items():
        if key.startswith("extra/"):
            section, name = _sorted(key.removeprefix("extra/"), _MEMORY)
            memory.setdefault(section, {})[name] = array
    return {section: Layout(tuple(found)) for section, found in specs.items()}, arrays, memory


def _sorted(name: str, rules: tuple[tuple[re.Pattern[str], str, str], ...]) -> tuple[SectionId, str]:
    for pattern, section, member in rules:
        if found := pattern.match(name):
            return SectionId(found.expand(section), found.expand(member)), name[found.end() :]
    return MODEL, name
