"""Resuming a run: its record so far, the settings that may change, and the lock on its folder."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from espalier.config.fields import FlatValue
from espalier.config.run_settings import RunSettings
from espalier.errors import ConfigError, StateError
from espalier.methods.power_of_choice import PowD
from espalier.methods.registry import METHODS
from espalier.methods.run_config import RunConfig
from espalier.storage.lock import FolderInUseError, FolderLock, holder, is_locked
from espalier.storage.run_folder import REPORT_FILE
from espalier.training.privacy import PrivacySettings
from espalier_server.records.events import EVENTS_FILE, read_events
from espalier_server.records.rebuild import from_events
from espalier_server.records.record import RunRecord
from espalier_server.superlink.clouds import running_clouds
from espalier_server.superlink.submission import submissions

log = logging.getLogger("espalier.cloud")

CHANGEABLE = frozenset(
    [
        "rounds",
        "round-deadline",
        "window-deadline",
        "hello-timeout",
        "keep-checkpoints",
        "out",
        "run-id",
        "eval-data",
        "eval-clients",
        "eval-every",
        "eval-samples",
        "sample-steps",
        "sample-count",
        "features",
    ]
)
"""Settings that a resume may change: length of the run, time limits, evaluation, output."""

CHANGEABLE_UNLESS_REPRODUCIBLE = frozenset({"min-edges", "min-clients", "quorum", "device"})
"""Further settings that a resume may change unless the run is reproducible."""

#: Seconds that a ServerApp waits for a previous one to release the run's folder.
LOCK_TIMEOUT = 30.0


def existing_record(folder: Path) -> RunRecord | None:
    """Return the record of a run so far, None if there is none.

    A damaged record is reconstructed from the events, which contain less.
    """
    try:
        if (folder / REPORT_FILE).exists():
            return RunRecord.read(folder)
    except StateError as error:
        log.warning("%s; its content is reconstructed from the events", error)
    events = read_events(folder / EVENTS_FILE)
    return from_events(events) if events else None


def recorded_settings(folder: Path) -> dict[str, FlatValue]:
    """Return the settings of the run in a folder, under their flat keys.

    Raises
    ------
    StateError
        The folder holds no run.
    """
    record = existing_record(folder)
    if record is None or not record.config:
        raise StateError(
            f"{folder} holds no run ({EVENTS_FILE} and {REPORT_FILE} are missing); give the --out folder of one"
        )
    return {**record.config, "run-id": record.run}


def check_changes(before: Mapping[str, FlatValue], now: RunSettings) -> None:
    """Check that a resume changes only settings that may change.

    Parameters
    ----------
    before : mapping
        Flat settings of the run so far.
    now : RunSettings
        Settings to resume with.

    Raises
    ------
    ConfigError
        With one line per changed setting that must not change.
    """
    previous = RunConfig.from_record(before)
    allowed = CHANGEABLE if now.reproducible else CHANGEABLE | CHANGEABLE_UNLESS_REPRODUCIBLE
    if previous.of(PowD.Settings).adaptive_candidates or previous.of(PrivacySettings).dp_sgd_epsilon:
        allowed -= {"rounds"}  # the candidates' number decays, and the epsilon is spent, over all rounds
    old = previous.to_flat() | _defaults_by_rounds(previous)
    new = now.to_flat() | _defaults_by_rounds(now)
    changed = [key for key in new if new[key] != old[key] and key not in allowed]
    if changed:
        raise ConfigError(
            "\n  ".join(
                [
                    "a resume cannot change these settings; leave them as they were, or start a new run:",
                    *(f"{key}: it was {old[key]!r} and would be {new[key]!r}" for key in changed),
                    f"may change: {', '.join(sorted(allowed - {'out', 'run-id'}))}",
                ]
            )
        )


def _defaults_by_rounds(config: RunSettings) -> dict[str, FlatValue]:
    """Return the effective values of the settings whose defaults depend on `rounds`."""
    return METHODS[config.method].defaults_by_rounds(config)


def resumed_settings(folder: Path, changes: Mapping[str, FlatValue]) -> dict[str, FlatValue]:
    """Return the settings to resume the run in a folder with.

    Parameters
    ----------
    folder : Path
        The run's folder; it may have been moved.
    changes : mapping
        Flat settings that replace those of the run.

    Raises
    ------
    ConfigError
        A change is not allowed, a setting is invalid, the run is finished, or it is still running.
    StateError
        The folder holds no run.
    """
    folder = folder.expanduser().resolve()
    before = recorded_settings(folder)
    run = str(before["run-id"])
    _refuse_running(folder, run)
    previous = RunConfig.from_record(before)
    # Settings whose defaults depend on `rounds` keep their values when `rounds` changes.
    wanted = {
        **previous.to_flat(),
        **_defaults_by_rounds(previous),
        **changes,
        "out": str(folder),
        "run-id": run,
    }
    now = RunConfig.from_flat(wanted)
    check_changes(before, now)
    record = existing_record(folder)
    assert record is not None
    done = max((entry.round for window in record.windows for entry in window.rounds), default=0)
    if record.status == "finished" and now.rounds <= previous.rounds:
        raise ConfigError(
            f"run {run} is finished: {previous.rounds} of {previous.rounds} rounds; "
            f"give -c rounds=N with more than {previous.rounds} to resume it"
        )
    if now.rounds < done:
        raise ConfigError(f"rounds: run {run} has completed {done} rounds; give at least as many")
    return wanted


def _refuse_running(folder: Path, run: str) -> None:
    for cloud in running_clouds():
        if any(s.run == run and s.folder == folder and not s.ended for s in submissions(cloud)):
            raise ConfigError(
                f"run {run} is still running at the cloud {cloud.name!r}, which resumes it automatically; "
                f"`espalier stop {run}` ends it"
            )
    if is_locked(folder):
        raise ConfigError(
            f"run {run} is still running (process {holder(folder)}); wait until it ends, or end it with "
            f"`espalier stop {run}`"
        )


@contextlib.contextmanager
def locked(folder: Path, timeout: float = LOCK_TIMEOUT) -> Iterator[None]:
    """Hold the exclusive lock on a run's folder; the kernel releases it when the process ends.

    Raises
    ------
    StateError
        Another process still holds it after `timeout` seconds, or the folder cannot be written to.
    """
    try:
        lock = FolderLock(folder, timeout)
    except FolderInUseError as error:
        raise StateError(
            f"process {error.holder} is running the run in {folder}; stop it, or wait until it ends"
        ) from None
    try:
        yield
    finally:
        lock.release()
