"""A run at the cloud: window after window, from hello to the last sample grid."""

from __future__ import annotations

import datetime
import importlib.metadata
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord

from common.errors import DataError, EspalierError
from common.flower.cloud_grid import LINK_LOST, TreeGrid
from common.learning.diffusion import ema_update
from common.learning.trainer import resolve_device
from common.methods.base import CloudState, Method, architecture_layout, build_model
from common.methods.planning import AtRandom, mean_homogeneity, plan_window
from common.methods.registry import create_method
from common.models.cost import macs_and_params
from common.models.initial import initial_model
from common.models.pipeline import save_model
from common.names import NameRegistry
from common.run.board import Board
from common.run.checkpoint import Checkpoints
from common.run.config import RunConfig
from common.run.events import EVENTS_FILE, EventLog
from common.run.ledger import Ledger
from common.run.record import (
    REPORT_FILE,
    ClientEntry,
    FaultEntry,
    Participation,
    RoundEntry,
    RunRecord,
    Traffic,
    WindowEntry,
)
from common.run.report import build_report
from common.wire.payload import Weights
from proto import espalier_pb2 as pb
from server.evaluation import Evaluator
from server.strategy import Version, WindowStrategy
from server.tree import Tree
from server.watch import Watch, stop_requested

log = logging.getLogger("espalier.cloud")

#: Seconds a window may take beyond its rounds: hellos, uploads, the edges' own work.
WINDOW_MARGIN = 60.0


@dataclass(frozen=True)
class StopRequested(Exception):  # noqa: N818 - no error, a wish
    """Somebody asked for the end of the run."""


class TreeRun:
    """One run of the tree.

    Parameters
    ----------
    settings : RunConfig
        The run's configuration.
    grid : TreeGrid
        The run's grid.
    out : Path
        The run's folder.
    state : Path
        Folder of what the cloud knows beyond a run: which key owns which edge name.
    """

    def __init__(self, settings: RunConfig, grid: TreeGrid, out: Path, state: Path) -> None:
        self.settings, self.grid, self.out = settings, grid, out
        self.run_id = settings.run_id or uuid.uuid4().hex[:12]
        self.method: Method = create_method(settings)
        self.events = EventLog(out / EVENTS_FILE)
        self.board = Board(out / "tensorboard")
        self.checkpoints = Checkpoints(out / "checkpoints", keep=settings.keep_checkpoints)
        self.tree = Tree(grid, NameRegistry(state / "edges.json"), self.run_id, settings.histogram_noise)
        self.ledger = Ledger()
        self.started = time.monotonic()
        self.record = RunRecord(
            espalier=importlib.metadata.version("espalier"),
            run=self.run_id,
            started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            method=settings.method,
            config=settings.to_flat(),
        )

    def run(self) -> None:
        """Run all windows; whatever ends the run, what it made so far is left in its folder.

        Raises
        ------
        EspalierError
            If the tree does not come together or the settings do not fit the data.
        """
        self.events.write("run", run=self.run_id, config=self.settings.to_flat(), pid=os.getpid())
        try:
            self._train()
        except StopRequested:
            self._close("stopped", "stopped by `espalier stop`")
        except LINK_LOST as error:
            # Not the last word: the cloud's supervisor starts the SuperLink again and submits the run again.
            self.events.write("interrupted", reason=f"the SuperLink is gone: {error}")
            raise
        except BaseException as error:
            self._close("failed", str(error) or type(error).__name__)
            raise
        else:
            self._close("finished", "")

    # --- the run -----------------------------------------------------------------------------------

    def _train(self) -> None:
        s = self.settings
        self.tree.gather(s, lambda: stop_requested(self.out))
        self._check_stop()
        resumed = self._resume()
        state, reached = resumed or (self._initial_state(), {})
        self._introduce()
        evaluator = Evaluator(s, self.tree.image_shape, resolve_device(s.device), cache=self.out / "features")
        strategy = WindowStrategy(self.method, state, self.tree, self.run_id, reached)
        strategy.summary()
        while state.round < s.rounds:
            self._window(strategy, state)
            self._look(strategy, state, evaluator)
            self._write_report()
            self._check_stop()

    def _initial_state(self) -> CloudState:
        model = initial_model(self.settings, self.tree.image_shape)
        state = CloudState(architecture=pb.ArchitectureSpec(), weights=Weights.pack({}))
        state.adopt(model)
        self._size(state, dense=True)
        self.method.before_run(state)
        if state.pruned:
            self._pruned(state)
        return state

    def _resume(self) -> tuple[CloudState, dict[str, Version]] | None:
        """Go on from the newest checkpoint of this run, if there is one; what came after it is forgotten."""
        window = self.checkpoints.latest()
        if window is None:
            return None
        tensors, meta = self.checkpoints.load(window)
        state, reached = restore(tensors, meta)
        self.record = RunRecord.read(self.out).model_copy(update={"status": "running", "reason": ""})
        self.record.windows = [w for w in self.record.windows if w.window <= window]
        self.record.quality = [q for q in self.record.quality if q.window <= window]
        self.started -= self.record.seconds
        self.record.faults = [f for f in self.record.faults if f.window <= window]
        for entry in self.record.windows:
            self.ledger.merge({link: t.model_dump() for link, t in entry.links.items()})
        log.info("run %s goes on after window %d", self.run_id, window)
        self.events.write("resumed", window=window, round=state.round)
        return state, reached

    def _introduce(self) -> None:
        """Enter the tree into the record."""
        members = self.tree.members()
        self.record.classes = list(self.tree.classes)
        self.record.edges = sorted(self.tree.edges())
        for member in members:
            hello = self.tree.hello_of(member.name)
            self.record.clients[member.name] = ClientEntry(
                samples=member.samples,
                edges=list(member.edges),
                labels=member.labels.tolist(),
                data=hello.data,
                device=hello.facts.device,
            )
        self.events.write("joined", edges=self.record.edges, clients=[m.name for m in members])

    def _window(self, strategy: WindowStrategy, state: CloudState) -> None:
        """Plan, train at the edges, aggregate."""
        s = self.settings
        start = time.monotonic()
        self.tree.greet()
        if not self.tree.members():
            self.tree.gather(s, lambda: stop_requested(self.out))
            self._check_stop()
        plan = strategy.draw()
        window = state.window + 1
        rounds = [
            {
                "round": strategy.first_round + i,
                "participants": [{"client": c, "edge": e} for c, e in a.items()],
            }
            for i, a in enumerate(plan)
        ]
        self.events.write("window-start", window=window, rounds=rounds)
        members = self.tree.members()
        random_plan = plan_window(
            members,
            AtRandom(),
            first_round=strategy.first_round,
            rounds=len(plan),
            fraction=s.fraction,
            seed=s.seed,
        )
        deadline = s.window_deadline or len(plan) * s.round_deadline + WINDOW_MARGIN
        arrays = state.weights.to_record()
        with Watch(self.tree, self.events):
            replies = self.grid.exchange(
                strategy.configure_train(window, arrays, ConfigRecord(), self.grid),
                deadline=deadline,
                cancelled=lambda: stop_requested(self.out),
            )
            strategy.aggregate_train(window, replies)
        self._check_stop()
        self._enter(
            strategy,
            state,
            time.monotonic() - start,
            mean_homogeneity(plan, members, s.homogeneity_form),
            mean_homogeneity(random_plan, members, s.homogeneity_form),
        )

    def _look(self, strategy: WindowStrategy, state: CloudState, evaluator: Evaluator) -> None:
        """After an aggregation: the method's own step, moving average, measures, samples, checkpoint."""
        s = self.settings
        pruned = state.pruned
        self._average(state)
        last = state.round >= s.rounds
        if last or state.window % s.eval_every == 0:
            self._evaluate(state, evaluator)
        self.method.after_window(state)
        if state.pruned and not pruned:
            self._pruned(state)
        start = time.monotonic()
        self._checkpoint(strategy, state)
        if last:
            self._save_model(state)
            shutil.copyfile(self._grid_path(state.window), self.out / "samples.png")
        self.record.windows[-1].timings["checkpoint"] = time.monotonic() - start

    def _evaluate(self, state: CloudState, evaluator: Evaluator) -> None:
        start = time.monotonic()
        model = build_model(state.architecture, state.ema or state.weights)
        try:
            found = evaluator.measure(model, state.window, state.round)
        except DataError as error:
            # A window's measure is no reason to lose the run.
            found = None
            fault = pb.Fault(tier="cloud", node="cloud", kind="evaluation", detail=str(error))
            fault.window, fault.round = state.window, state.round
            self._enter_faults([fault])
        if found is not None:
            self.record.quality.append(found)
            self.events.write("evaluation", **found.model_dump())
            self.board.evaluation(found)
        evaluator.grid(model, self._grid_path(state.window))
        self.record.windows[-1].timings["evaluate"] = time.monotonic() - start

    def _average(self, state: CloudState) -> None:
        if self.settings.ema_decay > 0:
            before = state.ema.views() if state.ema else {}
            state.ema = Weights.pack(ema_update(before, state.weights.views(), self.settings.ema_decay))

    # --- what is kept ------------------------------------------------------------------------------

    def _enter(
        self, strategy: WindowStrategy, state: CloudState, seconds: float, planned: float, random: float
    ) -> None:
        """Enter a window into record, events and TensorBoard."""
        outcome = strategy.outcome
        self.ledger.merge(outcome.ledger)
        entry = WindowEntry(
            window=state.window,
            rounds=_round_entries(strategy),
            rho=dict(outcome.rho),
            mu=dict(outcome.mu),
            mu_planned=planned,
            mu_random=random,
            samples={name: r.samples for name, r in outcome.reports.items()},
            labels={name: list(r.labels.counts) for name, r in outcome.reports.items()},
            links={k: Traffic(**v) for k, v in outcome.ledger.as_dict().items()},
            timings={"train": seconds},
        )
        self.record.windows.append(entry)
        self._enter_faults([*outcome.faults, *self.tree.faults])
        self.tree.faults.clear()
        self.board.window(entry)
        losses = {r.round: r.loss for r in entry.rounds}
        self.events.write(
            "window-end",
            window=state.window,
            losses=losses,
            rho=outcome.rho,
            mu=outcome.mu,
            links=self.ledger.as_dict(),
        )

    def _enter_faults(self, faults: Iterable[pb.Fault]) -> None:
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

    def _size(self, state: CloudState, *, dense: bool = False) -> None:
        macs, params = macs_and_params(state.model())
        size = self.record.model
        size.params, size.macs = params, macs
        if dense:
            size.params_dense, size.macs_dense = params, macs

    def _pruned(self, state: CloudState) -> None:
        self._size(state)
        size = self.record.model
        size.pruned_at_window, size.pruned_at_round = state.window, state.round
        self.events.write("prune", window=state.window, round=state.round, **size.model_dump())

    def _checkpoint(self, strategy: WindowStrategy, state: CloudState) -> None:
        tensors = {f"model/{n}": v for n, v in state.weights.views().items()}
        if state.ema:
            tensors |= {f"ema/{n}": v for n, v in state.ema.views().items()}
        tensors |= {f"extra/{n}": v for n, v in state.extra.items()}
        quality = self.record.quality
        self.checkpoints.save(
            state.window,
            tensors,
            {
                "run": self.run_id,
                "window": state.window,
                "round": state.round,
                "pruned": state.pruned,
                "architecture": state.architecture.SerializeToString().hex(),
                "reached": {name: list(version) for name, version in strategy.reached.items()},
                "config": self.settings.to_flat(),
                "score": quality[-1].frechet if quality else None,
            },
        )
        # Only from now on may clients forget what came before this window.
        strategy.checkpoint_window = state.window
        self.events.write("checkpoint", window=state.window)

    def _save_model(self, state: CloudState) -> None:
        size = self.record.model
        save_model(
            self.out / "model",
            build_model(state.architecture, state.ema or state.weights),
            schedule=self.settings,
            metadata={
                "run": self.run_id,
                "method": self.settings.method,
                "round": state.round,
                "params": size.params,
                "ema": state.ema is not None,
            },
        )

    def _grid_path(self, window: int) -> Path:
        return self.out / "samples" / f"window-{window:04d}.png"

    def _write_report(self) -> None:
        self.record.links = {k: Traffic(**v) for k, v in self.ledger.as_dict().items()}
        self.record.seconds = time.monotonic() - self.started
        self.record.write(self.out)

    def _close(self, status: str, reason: str) -> None:
        """Let the edges go and leave the report behind."""
        self.record.status, self.record.reason = status, reason  # type: ignore[assignment]
        try:
            self.tree.dismiss()
            self.grid.collect_late()
        except LINK_LOST as error:
            log.warning("the edges were not told that the run is over: %s", error)
        self._enter_faults(self.tree.faults)
        self._write_report()
        build_report(self.out)
        self.board.close()
        self.events.write(status, reason=reason)
        self.events.close()

    def _check_stop(self) -> None:
        if stop_requested(self.out):
            raise StopRequested


def restore(tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> tuple[CloudState, dict[str, Version]]:
    """Rebuild the cloud's state, and the newest state version of each client, from a checkpoint."""
    parts: dict[str, dict[str, np.ndarray]] = {"model": {}, "ema": {}, "extra": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = tensor
    architecture = pb.ArchitectureSpec.FromString(bytes.fromhex(meta["architecture"]))
    layout = architecture_layout(architecture)
    state = CloudState(
        architecture=architecture,
        weights=Weights.fill(layout, parts["model"]),
        window=meta["window"],
        round=meta["round"],
        ema=Weights.fill(layout, parts["ema"]) if parts["ema"] else None,
        pruned=meta["pruned"],
        extra=parts["extra"],
    )
    return state, {name: (at[0], at[1]) for name, at in meta["reached"].items()}


def _round_entries(strategy: WindowStrategy) -> list[RoundEntry]:
    """Merge the edges' records of each round."""
    entries = []
    for round_ in range(strategy.first_round, strategy.first_round + len(strategy.plan)):
        records = [
            (name, record)
            for name, report in sorted(strategy.outcome.reports.items())
            for record in report.rounds
            if record.round == round_
        ]
        clients = [(edge, client) for edge, record in records for client in record.clients]
        samples = sum(c.samples for _, c in clients)
        entries.append(
            RoundEntry(
                round=round_,
                loss=sum(c.loss * c.samples for _, c in clients) / samples if samples else None,
                participants=[Participation(client=c.client, edge=e) for e, c in clients],
                samples=samples,
                seconds=max((record.seconds for _, record in records), default=0.0),
            )
        )
    return entries


def run_folder(settings: RunConfig, flower_run: int) -> Path:
    """Return the run's folder: `out`, or one below the cloud's state.

    Raises
    ------
    EspalierError
        If it already holds another run; a run of the same `run-id` goes on there.
    """
    out = (
        Path(settings.out) if settings.out else cloud_state() / "runs" / (settings.run_id or str(flower_run))
    )
    if (out / REPORT_FILE).exists() and RunRecord.read(out).run != settings.run_id:
        raise EspalierError(f"{out} already holds another run; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    return out


def cloud_state() -> Path:
    """Return the folder of the cloud this ServerApp runs in: `espalier cloud` names it in the environment."""
    return Path(os.environ.get("ESPALIER_STATE") or Path.home() / ".local/state/espalier/cloud")
