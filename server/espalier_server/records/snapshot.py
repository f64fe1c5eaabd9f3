"""The cloud's state between two windows, and its conversion to and from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from espalier.methods.base import CloudState
from espalier.wire.payload import Layout, Weights
from espalier.wire.sections import MODEL, Payload, SectionId, Sections
from espalier_proto import espalier_pb2 as pb
from espalier_server.planning.members import FrozenMember
from espalier_server.planning.plans import Version
from espalier_server.records.schema_1 import from_schema_1


@dataclass(frozen=True)
class Snapshot:
    """The cloud's state between two windows.

    Edges store nothing between windows, and all randomness derives from the run's seed; so this and the clients'
    own states are the whole state of a run.

    Attributes
    ----------
    state : CloudState
        Sections of tensors, moving average, the memory of method and selection.
    reached : dict[str, Version]
        Newest state version of each client, which it starts from.
    members : dict[str, FrozenMember]
        The members of a reproducible run; empty otherwise.
    """

    state: CloudState
    reached: dict[str, Version] = field(default_factory=dict)
    members: dict[str, FrozenMember] = field(default_factory=dict)

    def pack(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the snapshot as tensors and JSON-compatible metadata."""
        state = self.state
        tensors = _joined(state.payload.views())
        if state.ema:
            tensors |= {f"ema/{n}": v for n, v in state.ema.views().items()}
        tensors |= {f"memory/{n}": v for n, v in _joined(state.memory).items()}
        return tensors, {
            "sections": [
                [s.name, s.member, layout.to_proto().SerializeToString(deterministic=True).hex()]
                for s, layout in state.payload.layouts.items()
            ],
            "memory": [[s.name, s.member, list(arrays)] for s, arrays in state.memory.items()],
            "window": state.window,
            "round": state.round,
            "pruned": state.pruned,
            "architecture": state.architecture.SerializeToString(deterministic=True).hex(),
            "population": state.population,
            "peers": {n: spec.SerializeToString(deterministic=True).hex() for n, spec in state.peers.items()},
            "reached": {name: list(version) for name, version in self.reached.items()},
            "members": {name: asdict(member) for name, member in self.members.items()},
        }

    @classmethod
    def unpack(cls, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Snapshot:
        """Return the snapshot of the tensors and metadata that `pack` returned; schema 1 is read, too."""
        architecture = pb.ArchitectureSpec.FromString(bytes.fromhex(meta["architecture"]))
        if "sections" in meta:
            layouts = {SectionId(name, member): _layout(text) for name, member, text in meta["sections"]}
            arrays: Sections = {
                s: {n: tensors[f"{s}/{n}"] for n in layout.names} for s, layout in layouts.items()
            }
            memory = {
                s: {n: tensors[f"memory/{s}/{n}"] for n in names}
                for s, names in ((SectionId(name, member), names) for name, member, names in meta["memory"])
            }
        else:
            layouts, arrays, memory = from_schema_1(_layout(meta["layout"]), tensors)
        averaged = {t.name: f"ema/{t.name}" for t in architecture.tensors}
        ema = None
        if averaged and all(key in tensors for key in averaged.values()):
            own = layouts[MODEL].only(averaged)
            ema = Weights.fill(own, {name: tensors[key] for name, key in averaged.items()})
        state = CloudState(
            architecture=architecture,
            payload=Payload.fill(layouts, arrays),
            window=meta["window"],
            round=meta["round"],
            population=meta["population"],
            peers={n: pb.ArchitectureSpec.FromString(bytes.fromhex(s)) for n, s in meta["peers"].items()},
            ema=ema,
            pruned=meta["pruned"],
            memory=memory,
        )
        members = {
            name: FrozenMember(tuple(m["edges"]), m["samples"], tuple(m["labels"]))
            for name, m in meta.get("members", {}).items()
        }
        return cls(state, {name: (at[0], at[1]) for name, at in meta["reached"].items()}, members)


def _joined(sections: Sections) -> dict[str, np.ndarray]:
    """Return all arrays under "SECTION/NAME"; the metadata lists sections and names, so keys are never parsed."""
    return {f"{section}/{name}": a for section, arrays in sections.items() for name, a in arrays.items()}


def _layout(text: str) -> Layout:
    return Layout.from_proto(pb.Layout.FromString(bytes.fromhex(text)).tensors, "the checkpoint")
