"""A run at the cloud: the loop over windows, from the first hello to the report."""

from __future__ import annotations

import logging
import os
import time
import uuid
from pathlib import Path
from typing import Literal

from espalier.config.run_settings import RunSettings
from espalier.config.timeouts import window_seconds
from espalier.errors import EspalierError, StateError
from espalier.methods.base import CloudState, Method
from espalier.methods.faug import AugmentSettings
from espalier.methods.homogeneity import ScoreSettings
from espalier.methods.levels import LevelSettings
from espalier.methods.planning import AtRandom, mean_homogeneity, plan_window
from espalier.methods.registry import create_method
from espalier.models.initial import import_ahead
from espalier.monitor.logs import bind
from espalier.security.keys import EDGE_KEYS, KEYS_ONLY, KeyRegistry
from espalier.security.name_registry import EDGE_NAMES, Claims, NameRegistry
from espalier.training.determinism import deterministic
from espalier.training.device import resolve_device
from espalier.training.privacy import PrivacySettings
from espalier.wire.payload import Weights
from espalier_server.augmentation import augment
from espalier_server.client_keys import ClientKeys
from espalier_server.ema import ema_update
from espalier_server.evaluation.assessment import Assessment
from espalier_server.evaluation.evaluator import create_evaluator
from espalier_server.exchange import MAX_ATTEMPTS
from espalier_server.planning.joining import wait_for_members
from espalier_server.planning.tree import Tree
from espalier_server.records.recorder import RunRecorder
from espalier_server.records.resume import check_changes, existing_record
from espalier_server.records.snapshot import Snapshot
from espalier_server.superlink.grid import LINK_LOST, TreeGrid
from espalier_server.watch import Watch, stop_requested
from espalier_server.window_aggregator import WindowAggregator
from espalier_server.window_outcome import CentralAggregate

log = logging.getLogger("espalier.cloud")


#: Number of times that a window without participants is planned before the run continues with the next window.
MAX_WINDOW_ATTEMPTS = 3


class StopRequested(Exception):  # noqa: N818 - control flow, not an error
    """The user requested to stop the run."""


class TreeRun:
    """One run of the tree.

    Parameters
    ----------
    settings : RunSettings
        The run's configuration.
    grid : TreeGrid
        The run's grid.
    out : Path
        The run's folder.
    state : Path
        The cloud's state folder, with the registries of edges and clients.
    """

    def __init__(self, settings: RunSettings, grid: TreeGrid, out: Path, state: Path) -> None:
        self.settings, self.grid, self.out = settings, grid, out
        self.run_id = settings.run_id or uuid.uuid4().hex[:12]
        self.method: Method = create_method(settings)
        set_by_devices = self.method.has_levels and settings.of(LevelSettings).level_choice == "device"
        smallest_level = min(settings.of(LevelSettings).shares) if set_by_devices else 0.0
        names, keys = edge_names(state), ClientKeys(state, keys_only=bool(os.environ.get(KEYS_ONLY)))
        epsilon = settings.of(PrivacySettings).histogram_epsilon
        self.tree = Tree(grid, names, self.run_id, epsilon, keys, smallest_level, settings.reproducible)
        self.recorder = RunRecorder(settings, self.run_id, out)
        self.state: CloudState | None = None
        self.assessment: Assessment | None = None

    def run(self) -> None:
        """Run all windows; however the run ends, its results so far are in its folder.

        Raises
        ------
        EspalierError
            If too few edges or clients join, or the settings do not fit the data.
        """
        try:
            with bind(run=self.run_id), deterministic(self.settings.reproducible):
                self._train()
        except StopRequested:
            self._close("stopped", "stopped by `espalier stop`")
        except (*LINK_LOST, KeyboardInterrupt, SystemExit) as error:
            # The SuperLink has ended, or Flower ends this process because of that. The cloud's supervisor will
            # restart the SuperLink and resubmit the run.
            self.recorder.events.write("interrupted", reason=str(error) or type(error).__name__)
            raise
        except Exception as error:
            self._close("failed", str(error) or type(error).__name__)
            raise
        else:
            self._close("finished", "")

    def _train(self) -> None:
        s = self.settings
        resumed = self.recorder.resume()
        if resumed is not None:
            self.tree.freeze_members(resumed.members)
        import_ahead(s)  # before edges and clients have joined, so that they do not wait for it
        wait_for_members(self.tree, s, self._stopping)
        self._check_stop()
        self.method.set_data_shape(self.tree.image_shape, len(self.tree.classes))
        if resumed is None:
            self.tree.freeze_members()
        state = self._initial_state() if resumed is None else resumed.state
        reached = {} if resumed is None else resumed.reached
        self.state = state
        self.recorder.restarted()
        self.recorder.joined(self.tree)
        evaluator = create_evaluator(
            s, self.tree.image_shape, self.tree.classes, resolve_device(s.cloud_device), self.out / "features"
        )
        strategy = WindowAggregator(self.method, state, self.tree, self.run_id, reached)
        log.info("%s: %d rounds in %d windows of %d", self.method.name, s.rounds, s.windows, s.rg)
        if state.window == 0:
            if s.of(AugmentSettings).augment == "faug":
                self._augment(strategy)
            self.method.before_run(state, strategy.ask)
            if state.pruned:
                self.recorder.pruned(state)
        self.assessment = Assessment(self.method, strategy, evaluator, self.recorder)
        while state.round < s.rounds:
            self._window(strategy, state)
            self._finish_window(strategy, state)
            self._check_stop()
        self._save_model()

    def _augment(self, strategy: WindowAggregator) -> None:
        """Run FAug's augmentation, and record its traffic and privacy leakage."""
        samples, device = (
            self.out / "samples" / "augmentation.png",
            resolve_device(self.settings.cloud_device),
        )
        entry = augment(self.settings, strategy, len(self.tree.classes), device, samples)
        self.recorder.augmented(entry, strategy.outcome)

    def _initial_state(self) -> CloudState:
        state = self.method.initial_state()
        if state.architecture.tensors:
            self.recorder.dense(state)
        state.population = self.tree.population
        return state

    def _window(self, strategy: WindowAggregator, state: CloudState) -> None:
        """Plan a window, train at the edges and aggregate; retry if there were no participants."""
        for attempt in range(MAX_WINDOW_ATTEMPTS):
            strategy.may_repeat = attempt + 1 < MAX_WINDOW_ATTEMPTS
            window = state.window
            self._try_window(strategy, state)
            if state.window > window:
                return

    def _try_window(self, strategy: WindowAggregator, state: CloudState) -> None:
        s = self.settings
        start = time.monotonic()
        self._await_members()
        members = self.tree.members()
        plan, window = strategy.draw(members).rounds, state.window + 1
        self.recorder.planned(strategy, window)
        by_name = {m.name: m for m in members}
        random_plan = plan_window(
            [[by_name[c] for c in assignment if c in by_name] for assignment in plan],
            members,
            AtRandom(),
            first_round=strategy.first_round,
            seed=s.seed,
        )
        strategy.advance(*self._collect(strategy, window))
        faults = [*strategy.outcome.faults, *self.tree.faults]
        self.tree.faults.clear()
        if state.window < window:
            log.warning("window %d had no participants; retrying", window)
            self.recorder.ledger.merge(strategy.outcome.ledger)
            self.recorder.faults(faults)
            return
        planned, random = (
            mean_homogeneity(p, members, s.of(ScoreSettings).homogeneity_form) for p in (plan, random_plan)
        )
        self.recorder.window(strategy, time.monotonic() - start, planned, random)
        self.recorder.faults(faults)

    def _await_members(self, *, all_edges: bool = False) -> None:
        """Exchange hellos and wait until there is a member, or, in a reproducible run, all members are connected."""
        self.tree.refresh(all_edges=all_edges)
        while not self.tree.members() or self.tree.absent():
            wait_for_members(self.tree, self.settings, self._stopping)
            self._check_stop()

    def _collect(self, strategy: WindowAggregator, window: int) -> tuple[CentralAggregate, int]:
        """Send a window's plan to the edges and aggregate their reports.

        If a participant of a reproducible run is missing, the reports are discarded and the window is sent again:
        clients return to the state version that the plan names.

        Raises
        ------
        EspalierError
            If a participant was missing in every attempt.
        """
        s = self.settings
        rounds = len(strategy.plan)
        for _ in range(MAX_ATTEMPTS):
            with Watch(self.tree, self.recorder.events, window) as watch:
                replies = self.grid.exchange(
                    strategy.send(),
                    deadline=window_seconds(rounds, s.round_deadline, s.window_deadline),
                    cancelled=self._stopping,
                    lost=watch.lost,
                )
                result = strategy.collect(replies)
            self._check_stop()
            missing = strategy.missing_clients()
            if not (s.reproducible and missing):
                return result
            self.recorder.faults(strategy.outcome.faults)
            strategy.reset_outcome()
            self._await_members(all_edges=True)
        raise EspalierError(
            f"window {window} lacked {'; '.join(missing[:5])} in {MAX_ATTEMPTS} attempts, so the run is not "
            "reproducible; restart them and resume it"
        )

    def _finish_window(self, strategy: WindowAggregator, state: CloudState) -> None:
        """Update the moving average, evaluate, call the method's `after_window`, and write a checkpoint."""
        s = self.settings
        if s.ema_decay > 0:
            own = state.weights.layout.only(t.name for t in state.architecture.tensors)
            before, now = state.ema.views() if state.ema else {}, state.tensors
            averaged = ema_update(before, {n: now[n] for n in own.names}, s.ema_decay)
            state.ema = Weights.fill(own, averaged)
        last = state.round >= s.rounds
        if last or state.window % s.eval_every == 0:
            assert self.assessment is not None
            self.assessment.measure()
        pruned = state.pruned
        self.method.after_window(state)
        if state.pruned and not pruned:
            self.recorder.pruned(state)
        start = time.monotonic()
        self.recorder.checkpoint(Snapshot(state, strategy.reached, self.tree.frozen_members))
        # From now on clients may delete their states of earlier versions.
        strategy.checkpoint_window = state.window
        self.recorder.record_duration("checkpoint", time.monotonic() - start)

    def _close(self, status: Literal["finished", "stopped", "failed"], reason: str) -> None:
        """Notify the edges and write the report; for a stopped run write the model, too."""
        try:
            self.tree.finish()
            self.grid.collect_late()
        except LINK_LOST as error:
            log.warning("cannot notify the edges of the end of the run: %s", error)
        try:
            self.recorder.faults(self.tree.faults)
            if status == "stopped":
                self._save_model()
            self.recorder.close(status, reason)
        except StateError as error:
            if status != "failed":
                raise
            log.error("cannot write the final event of the run: %s", error)

    def _save_model(self) -> None:
        """Write the first deployed network at the cloud, if the method has one there."""
        if self.assessment is None or self.state is None or not self.state.window:
            return
        if network := next((n for n in self.assessment.networks() if n.at_cloud), None):
            self.recorder.model(network, self.state)

    def _stopping(self) -> bool:
        return stop_requested(self.out)

    def _check_stop(self) -> None:
        if self._stopping():
            raise StopRequested


def run_folder(settings: RunSettings, flower_run: int) -> Path:
    """Return the run's folder, which is created if necessary: `out`, or a folder in the cloud's state."""
    out = (
        Path(settings.out) if settings.out else cloud_state() / "runs" / (settings.run_id or str(flower_run))
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StateError(f"cannot create {out}: {error.strerror}; give another --out") from error
    return out


def check_folder(settings: RunSettings, out: Path) -> None:
    """Check that a run can begin in a folder, or be resumed in it with these settings.

    Raises
    ------
    EspalierError
        The folder holds another run, or the same run with settings that must not change.
    """
    record = existing_record(out)
    if record is None:
        return
    if record.run != settings.run_id:
        raise EspalierError(f"{out} already holds another run, {record.run}; give another --out")
    check_changes(record.config, settings)


def edge_names(state: Path) -> Claims:
    """Return the registry of edge names: the registered keys if the cloud admits only those, else the keys seen."""
    if os.environ.get(KEYS_ONLY):
        return KeyRegistry(state / EDGE_KEYS)
    return NameRegistry(state / EDGE_NAMES)


def cloud_state() -> Path:
    """Return the state folder of the cloud that runs this ServerApp, from the environment or the default."""
    return Path(os.environ.get("ESPALIER_STATE") or Path.home() / ".local/state/espalier/cloud")
