"""Writes the files of a run while it runs: report.json, events, TensorBoard, checkpoints and the model."""

from __future__ import annotations

import datetime
import logging
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from espalier import distribution
from espalier.config.run_settings import RunSettings
from espalier.methods.base import CloudState, Deployed, build_model
from espalier.models.pipeline import save_model
from espalier.tasks.diffusion_settings import DiffusionSettings
from espalier.training.privacy import PrivacySettings
from espalier.wire.traffic import Ledger
from espalier_proto import espalier_pb2 as pb
from espalier_server.evaluation.cost import macs_and_params
from espalier_server.planning.tree import Tree
from espalier_server.records.checkpoint import Checkpoints
from espalier_server.records.events import EVENTS_FILE, EventLog, interruptions
from espalier_server.records.record import (
    AccuracyEntry,
    AugmentationEntry,
    ClientEntry,
    Evaluation,
    FaultEntry,
    ModelSize,
    RunRecord,
    SignatureEntry,
    Traffic,
)
from espalier_server.records.report import build_report
from espalier_server.records.resume import existing_record
from espalier_server.records.snapshot import Snapshot
from espalier_server.records.tensorboard import TensorBoardWriter
from espalier_server.records.window_entries import client_trainings, signature_entry, window_entry
from espalier_server.window_aggregator import WindowAggregator
from espalier_server.window_outcome import WindowOutcome

log = logging.getLogger("espalier.cloud")


class RunRecorder:
    """Writes what happens in a run to its folder.

    Parameters
    ----------
    settings : RunSettings
        The run's configuration.
    run : str
        Espalier's run id.
    out : Path
        The run's folder.
    """

    def __init__(self, settings: RunSettings, run: str, out: Path) -> None:
        self.settings, self.run, self.out = settings, run, out
        self.events = EventLog(out / EVENTS_FILE)
        self.tensorboard = TensorBoardWriter(out / "tensorboard")
        self.checkpoints = Checkpoints(out / "checkpoints", keep=settings.keep_checkpoints)
        self.ledger = Ledger()
        self.started = time.monotonic()
        self._roster: dict[str, dict[str, dict[str, object]]] = {}
        # An existing record is replaced only when `resume` finds no checkpoint.
        existing = existing_record(out)
        self.record = self._new_record() if existing is None else existing
        self.started -= self.record.seconds
        self.events.write("run", run=run, config=settings.to_flat(), pid=os.getpid())

    def grid_path(self, window: int) -> Path:
        """Return the path of the sample grid of a window."""
        return self.out / "samples" / f"window-{window:04d}.png"

    def resume(self) -> Snapshot | None:
        """Resume from the newest checkpoint of this run, if there is one; later windows are removed from the record.

        Raises
        ------
        StateError
            The checkpoint is damaged; in report.json only the status changes then.
        """
        window = self.checkpoints.latest()
        if window is None:
            self.record, self.started = self._new_record(), time.monotonic()
            return None
        found = Snapshot.unpack(*self.checkpoints.load(window))
        record = self.record
        record.status, record.reason, record.config = "running", "", self.settings.to_flat()
        record.windows = [w for w in record.windows if w.window <= window]
        record.quality = [q for q in record.quality if q.window <= window]
        record.accuracy = [a for a in record.accuracy if a.window <= window]
        record.faults = [f for f in record.faults if f.window <= window]
        if (record.model.pruned_at_window or 0) > window:
            size = record.model
            record.model = ModelSize(
                params=size.params_dense,
                macs=size.macs_dense,
                params_dense=size.params_dense,
                macs_dense=size.macs_dense,
            )
        spent = [record.augmentation.links] if record.augmentation else []
        for links in [*spent, *(w.links for w in record.windows)]:
            self.ledger.merge({link: t.model_dump() for link, t in links.items()})
        log.info("run %s resumes after window %d", self.run, window)
        self.events.write("resumed", window=window, round=found.state.round)
        return found

    def _new_record(self) -> RunRecord:
        return RunRecord(
            espalier=distribution.version(),
            run=self.run,
            started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            method=self.settings.method,
            config=self.settings.to_flat(),
        )

    def restarted(self) -> None:
        """Record restarts of the ServerApp after exits without a final event."""
        counted = sum(f.kind == "restart" for f in self.record.faults)
        window = len(self.record.windows)
        for _ in range(interruptions(self.out / EVENTS_FILE) - counted):
            detail = f"the ServerApp was restarted and resumes after window {window}"
            self.faults([pb.Fault(tier="cloud", node="cloud", kind="restart", detail=detail, window=window)])

    # --- events of a run ------------------------------------------------------------------------------

    def joined(self, tree: Tree) -> None:
        """Record the edges and clients."""
        members = tree.members()
        self.record.classes = list(tree.classes)
        self.record.edges = sorted(tree.edges())
        for member in members:
            hello = tree.hello_of(member.name)
            known = self.record.clients.get(member.name, ClientEntry()).privacy
            if hello.histogram.noisy:
                known.histogram = self.settings.of(PrivacySettings).histogram_epsilon
            self.record.clients[member.name] = ClientEntry(
                samples=member.samples,
                edges=list(member.edges),
                labels=member.labels.tolist(),
                data=hello.data,
                device=hello.facts.device,
                privacy=known,
            )
        self.events.write("joined", edges=self.record.edges, clients=[m.name for m in members])
        self.connected(tree)

    def connected(self, tree: Tree) -> None:
        """Write a ``roster`` event if the connected edges and clients, or their facts, have changed."""
        roster = tree.roster()
        if roster != self._roster:
            self._roster = roster
            self.events.write("roster", **roster)

    def planned(self, strategy: WindowAggregator, window: int) -> None:
        """Record the participants of each round of a window, and their edges."""
        rounds = [
            {
                "round": strategy.first_round + i,
                "participants": [{"client": c, "edge": e} for c, e in assignment.items()],
            }
            for i, assignment in enumerate(strategy.plan)
        ]
        self.events.write("window-start", window=window, rounds=rounds)
        self.connected(strategy.tree)

    def window(self, strategy: WindowAggregator, seconds: float, mu_planned: float, mu_random: float) -> None:
        """Record an aggregated window.

        Parameters
        ----------
        strategy : WindowAggregator
            The window after its aggregation.
        seconds : float
            Its duration.
        mu_planned, mu_random : float
            See :class:`~espalier_server.records.record.WindowEntry`.
        """
        outcome = strategy.outcome
        self.ledger.merge(outcome.ledger)
        entry = window_entry(strategy, seconds, mu_planned, mu_random)
        self.record.windows.append(entry)
        for report in (c for edge in outcome.reports.values() for r in edge.rounds for c in r.clients):
            self.record.clients.setdefault(report.client, ClientEntry()).privacy.update_from(report.metrics)
        self.tensorboard.window(entry)
        self.events.write(
            "window-end",
            window=entry.window,
            losses={r.round: r.loss for r in entry.rounds},
            rho=outcome.rho,
            mu=outcome.mu,
            links=self.ledger.as_dict(),
            clients=client_trainings(outcome),
        )
        self.connected(strategy.tree)

    def record_duration(self, phase: str, seconds: float) -> None:
        """Record the seconds that a phase of the newest window took."""
        self.record.windows[-1].timings[phase] = seconds

    def faults(self, faults: Iterable[pb.Fault]) -> None:
        """Record faults that the run tolerated."""
        for fault in faults:
            entry = FaultEntry(
                tier=fault.tier,
                node=fault.node,
                kind=fault.kind,
                detail=fault.detail,
                window=fault.window,
                round=fault.round,
            )
            self.record.faults.append(entry)
            self.events.write("fault", **entry.model_dump())

    def evaluation(self, found: Evaluation | AccuracyEntry) -> None:
        """Record the quality of a window's samples, or its accuracies."""
        if isinstance(found, Evaluation):
            self.record.quality.append(found)
            self.tensorboard.evaluation(found)
            self.events.write("evaluation", **found.model_dump())
        else:
            self.record.accuracy.append(found)
            self.tensorboard.accuracy(found)
            self.events.write("accuracy", **found.model_dump())

    def dense(self, state: CloudState) -> None:
        """Record the size of the network before pruning."""
        size = self.record.model
        size.macs, size.params = macs_and_params(state.model())
        size.macs_dense, size.params_dense = size.macs, size.params

    def pruned(self, state: CloudState) -> None:
        """Record the size of the network after pruning."""
        size = self.record.model
        size.macs, size.params = macs_and_params(state.model())
        size.pruned_at_window, size.pruned_at_round = state.window, state.round
        self.events.write("prune", window=state.window, round=state.round, **size.model_dump())

    def record_inquiries(self, outcome: WindowOutcome) -> None:
        """Add the traffic, signatures and faults of an evaluation at the clients to the newest window."""
        self.ledger.merge(outcome.ledger)
        for link, counts in outcome.ledger.as_dict().items():
            entry = self.record.windows[-1].links[link]
            entry.up_bytes += counts["up_bytes"]
            entry.down_bytes += counts["down_bytes"]
            entry.messages += counts["messages"]
        before, found = self.record.windows[-1].signatures, signature_entry(outcome)
        self.record.windows[-1].signatures = SignatureEntry(
            edges=before.edges + found.edges,
            cloud=before.cloud + found.cloud,
            unsigned=sorted({*before.unsigned, *found.unsigned}),
        )
        self.faults(outcome.faults)

    def augmented(self, entry: AugmentationEntry, outcome: WindowOutcome) -> None:
        """Record FAug's augmentation before the first round."""
        self.ledger.merge(outcome.ledger)
        entry.links = {k: Traffic(**v) for k, v in outcome.ledger.as_dict().items()}
        self.record.augmentation = entry
        self.faults(outcome.faults)
        self.events.write("augmented", **entry.model_dump())

    # --- files ------------------------------------------------------------------------------

    def checkpoint(self, snapshot: Snapshot) -> None:
        """Write report.json, then the checkpoint: the record must include every window of the checkpoint."""
        self.write()
        tensors, meta = snapshot.pack()
        window = snapshot.state.window
        run_meta = {"run": self.run, "config": self.settings.to_flat(), "score": self._score()}
        self.checkpoints.save(window, tensors, meta | run_meta)
        self.events.write("checkpoint", window=window)

    def _score(self) -> float | None:
        """Return the score of a checkpoint; lower is better."""
        if self.record.accuracy:
            newest = self.record.accuracy[-1]
            best = max((m.accuracy or 0.0 for m in newest.models.values()), default=newest.mean)
            return None if best is None else -best
        return self.record.quality[-1].frechet if self.record.quality else None

    def model(self, network: Deployed, state: CloudState) -> None:
        """Write the model folder, and the newest sample grid as samples.png."""
        save_model(
            self.out / "model",
            build_model(network.architecture, network.weights),
            schedule=self.settings.of(DiffusionSettings),
            metadata={
                "run": self.run,
                "method": self.settings.method,
                "network": network.label,
                "round": state.round,
                "params": self.record.model.params,
                "ema": state.ema is not None,
            },
        )
        if grids := sorted((self.out / "samples").glob("window-*.png")):
            shutil.copyfile(grids[-1], self.out / "samples.png")

    def write(self) -> None:
        """Write report.json."""
        self.record.links = {k: Traffic(**v) for k, v in self.ledger.as_dict().items()}
        self.record.seconds = time.monotonic() - self.started
        self.record.write(self.out)

    def close(self, status: Literal["finished", "stopped", "failed"], reason: str) -> None:
        """Write the final status and event, and report.html."""
        self.record.status, self.record.reason = status, reason
        self.write()
        build_report(self.out)
        self.tensorboard.close()
        self.events.write(status, reason=reason)
        self.events.close()
