"""Flat federated learning: a method's server directly over the clients, without edges, reports or merging.

The reference of the exactness law. It shares with the tree what a method is (contribute, step) and what a
client does, and nothing of what makes it a tree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from bench.local_grid import LocalFleet, LocalGrid, client_node
from bench.local_tree import LocalClient
from flwr.app import ConfigRecord

from espalier.methods.aggregate import Aggregate
from espalier.methods.base import CloudState
from espalier.methods.planning import Member
from espalier.methods.registry import create_method
from espalier.methods.run_config import RunConfig
from espalier.methods.selection import Answer
from espalier.security.name_registry import NameRegistry
from espalier.wire.sections import GRADIENT, Payload
from espalier_client.app import app as client_app
from espalier_edge.calls import Caller
from espalier_edge.roster import Roster
from espalier_proto import espalier_pb2 as pb
from espalier_server.planning.plans import draw_window, inquiry_plan, window_plan


class FlatRun:
    """A run of a method over clients that are its server's own."""

    def __init__(
        self, folder: Path, clients: Sequence[LocalClient], settings: Mapping[str, bool | int | float | str]
    ) -> None:
        self.settings = RunConfig.from_flat({"run-id": "flat", **settings, "rg": 1})
        self.method = create_method(self.settings)
        nodes = [client_node(100 + i, client_app, self._config(folder, c)) for i, c in enumerate(clients)]
        fleet = LocalFleet(nodes)
        self.grid = LocalGrid(nodes)
        (folder / "flat").mkdir(parents=True, exist_ok=True)
        self.roster = Roster(cast(Any, fleet), NameRegistry(folder / "flat" / "names.json"))
        self.roster.refresh(cast(Any, self.grid), ConfigRecord({"run": "flat"}), 10)
        self.hellos = {n: k.hello for n, k in self.roster.clients().items()}
        self.members = [
            Member(n, h.samples, np.asarray(h.histogram.counts), ("flat",)) for n, h in self.hellos.items()
        ]
        first = next(iter(self.hellos.values()))
        channels, height, width = first.image_shape
        self.method.set_data_shape((channels, height, width), len(first.classes))
        self.state = self.method.initial_state()
        self.state.population = len(self.members)
        self.reached: dict[str, tuple[int, int]] = {}
        self.faults: list[pb.Fault] = []
        self.selection = self.method.selection()

    @staticmethod
    def _config(folder: Path, client: LocalClient) -> dict[str, Any]:
        state = str(folder / "flat-clients" / client.name)
        config = {"name": client.name, "data": client.data, "state": state, "device": "cpu"}
        return config | dict(client.node_config or {})

    def run(self) -> CloudState:
        """Run all rounds."""
        self.method.before_run(self.state, self.ask)
        while self.state.round < self.settings.rounds:
            self._round()
            self.method.after_window(self.state)
        return self.state

    def _round(self) -> None:
        draw = draw_window(self.method, self.selection, self.state, self.members, self.ask)
        plan = window_plan(self.method, self.state, "flat", draw, self.reached, self.state.window)
        [schedule] = plan.rounds
        aggregate, metrics = Aggregate(self.state.payload.layouts), {}
        for answer in self._caller(plan).call(
            schedule.participants,
            {p.client: p.start for p in schedule.participants},
            schedule.round,
            self.state,
        ):
            try:
                self.method.add(aggregate, answer.update, self.state)
            except ValueError as error:
                self.faults.append(pb.Fault(node=answer.update.name, detail=str(error)))
                continue
            metrics[answer.update.name] = {"loss": answer.report.loss, **answer.report.metrics}
            self.reached[answer.update.name] = (plan.window, schedule.round)
        self.state.window += 1
        self.state.round += 1
        self.method.central_step(self.state, aggregate)
        gradients = {c: s[GRADIENT] for c, s in aggregate.forwarded.items() if GRADIENT in s}
        self.selection.observe(schedule.round, metrics, gradients)

    def ask(
        self,
        kind: str,
        architecture: pb.ArchitectureSpec,
        payload: Payload,
        clients: Sequence[str] | None = None,
        keys: Mapping[str, str] | None = None,
    ) -> dict[str, Answer]:
        """Ask clients directly."""
        where = {m.name: "flat" for m in self.members if clients is None or m.name in clients}
        plan = inquiry_plan(
            self.method,
            self.state,
            "flat",
            kind,
            architecture,
            payload.layouts,
            where,
            keys or {},
            self.reached,
            0,
        )
        [schedule] = plan.rounds
        server = CloudState(architecture, payload, self.state.population)
        found = {}
        for answer in self._caller(plan).call(
            schedule.participants,
            {p.client: p.start for p in schedule.participants},
            schedule.round,
            server,
            inquiry=kind,
        ):
            tensors = {n: a for arrays in answer.update.extra.values() for n, a in arrays.items()}
            found[answer.update.name] = Answer({"loss": answer.report.loss, **answer.report.metrics}, tensors)
        return found

    def _caller(self, plan: pb.WindowPlan) -> Caller:
        report = pb.EdgeReport()
        caller = Caller("flat", plan, self.method, cast(Any, self.grid), self.roster, report)
        self.faults.extend(report.faults)
        return caller
