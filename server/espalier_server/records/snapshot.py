"""Everything a run goes on from, to and from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from espalier.methods.base import CloudState
from espalier.wire.payload import Layout, Weights
from espalier_proto import espalier_pb2 as pb
from espalier_server.planning.plans import Version
from espalier_server.planning.tree import SettledMember


@dataclass(frozen=True)
class Snapshot:
    """The cloud's state between two windows, and what it knows of the tree.

    Edges keep nothing from one window to the next, and every random number hangs on the run's seed; so this
    and the clients' own versions are all there is.

    Attributes
    ----------
    state : CloudState
        Weights, the method's sections, moving average, what method and selection remember.
    reached : dict[str, Version]
        Newest state version of each client; a client goes back to it.
    members : dict[str, SettledMember]
        Who takes part in a reproducible run; empty otherwise.
    """

    state: CloudState
    reached: dict[str, Version] = field(default_factory=dict)
    members: dict[str, SettledMember] = field(default_factory=dict)

    def pack(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return it as tensors, and what JSON can hold."""
        state = self.state
        tensors = {f"model/{n}": v for n, v in state.tensors.items()}
        if state.ema:
            tensors |= {f"ema/{n}": v for n, v in state.ema.views().items()}
        tensors |= {f"extra/{n}": v for n, v in state.extra.items()}
        return tensors, {
            "window": state.window,
            "round": state.round,
            "pruned": state.pruned,
            "architecture": state.architecture.SerializeToString(deterministic=True).hex(),
            "layout": state.weights.layout.to_proto().SerializeToString(deterministic=True).hex(),
            "population": state.population,
            "peers": {n: spec.SerializeToString(deterministic=True).hex() for n, spec in state.peers.items()},
            "reached": {name: list(version) for name, version in self.reached.items()},
            "members": {name: asdict(member) for name, member in self.members.items()},
        }

    @classmethod
    def unpack(cls, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Snapshot:
        """Rebuild it from what `pack` returned."""
        parts: dict[str, dict[str, np.ndarray]] = {"model": {}, "ema": {}, "extra": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        architecture = pb.ArchitectureSpec.FromString(bytes.fromhex(meta["architecture"]))
        layout = Layout.from_proto(
            pb.Layout.FromString(bytes.fromhex(meta["layout"])).tensors, "the checkpoint"
        )
        own = layout.only(t.name for t in architecture.tensors) if parts["ema"] else Layout(())
        state = CloudState(
            architecture=architecture,
            weights=Weights.fill(layout, parts["model"]),
            window=meta["window"],
            round=meta["round"],
            population=meta["population"],
            peers={n: pb.ArchitectureSpec.FromString(bytes.fromhex(s)) for n, s in meta["peers"].items()},
            ema=Weights.fill(own, parts["ema"]) if parts["ema"] else None,
            pruned=meta["pruned"],
            extra=parts["extra"],
        )
        members = {
            name: SettledMember(tuple(m["edges"]), m["samples"], tuple(m["labels"]))
            for name, m in meta.get("members", {}).items()
        }
        return cls(state, {name: (at[0], at[1]) for name, at in meta["reached"].items()}, members)
