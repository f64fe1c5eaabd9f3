"""Going on with a run: what its folder says of it, which settings may change, and who works in it now."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from espalier.config.fields import FlatValue
from espalier.config.run_settings import RunSettings
from espalier.errors import ConfigError, StateError
from espalier.methods.power_of_choice import PowD
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

HARMLESS = frozenset(
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
"""Settings that a resume may change: how long, how patient, what is measured and kept."""

HARMLESS_BY_CHANCE = frozenset({"min-edges", "min-clients", "quorum", "device"})
"""Settings that it may change besides, unless the run is reproducible."""

#: Seconds a ServerApp waits for the one before it to be gone.
LOCK_PATIENCE = 30.0


def existing_record(folder: Path) -> RunRecord | None:
    """Return the record that a run left so far, None where it left nothing.

    One that is damaged is told again from the events, as far as these go.
    """
    try:
        if (folder / REPORT_FILE).exists():
            return RunRecord.read(folder)
    except StateError as error:
        log.warning("%s; what the events tell takes its place", error)
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
    """Refuse a resume under settings by which it would be another run.

    Parameters
    ----------
    before : mapping
        Flat settings of the run so far.
    now : RunSettings
        Those it is to go on with.

    Raises
    ------
    ConfigError
        With one line per setting that may not change.
    """
    former = RunConfig.from_record(before)
    allowed = HARMLESS if now.reproducible else HARMLESS | HARMLESS_BY_CHANCE
    if former.of(PowD.Settings).adaptive_candidates or former.of(PrivacySettings).dp_sgd_epsilon:
        allowed -= {"rounds"}  # d falls, and the epsilon is spent, over the whole run
    old, new = former.to_flat() | _frozen(former), now.to_flat() | _frozen(now)
    changed = [key for key in new if new[key] != old[key] and key not in allowed]
    if changed:
        raise ConfigError(
            "\n  ".join(
                [
                    "a resume cannot change what the run is; leave these settings, or start a new run:",
                    *(f"{key}: it was {old[key]!r} and would be {new[key]!r}" for key in changed),
                    f"may change: {', '.join(sorted(allowed - {'out', 'run-id'}))}",
                ]
            )
        )


def _frozen(config: RunSettings) -> dict[str, FlatValue]:
    """Return what the settings mean whose default hangs on `rounds`."""
    from espalier.methods.registry import METHODS

    return METHODS[config.method].defaults_by_rounds(config)


def resumed_settings(folder: Path, changes: Mapping[str, FlatValue]) -> dict[str, FlatValue]:
    """Return the settings with which the run in a folder goes on.

    Parameters
    ----------
    folder : Path
        The run's folder; it may have been moved.
    changes : mapping
        Flat settings given anew.

    Raises
    ------
    ConfigError
        A change is not allowed or a setting at fault; or the run is finished, or still going on.
    StateError
        The folder holds no run.
    """
    folder = folder.expanduser().resolve()
    before = recorded_settings(folder)
    run = str(before["run-id"])
    _refuse_running(folder, run)
    former = RunConfig.from_record(before)
    # What was settled by the number of rounds stays as it was when that number changes.
    wanted = {**former.to_flat(), **_frozen(former), **changes, "out": str(folder), "run-id": run}
    now = RunConfig.from_flat(wanted)
    check_changes(before, now)
    record = existing_record(folder)
    assert record is not None
    done = max((entry.round for window in record.windows for entry in window.rounds), default=0)
    if record.status == "finished" and now.rounds <= former.rounds:
        raise ConfigError(
            f"run {run} is finished: {former.rounds} of {former.rounds} rounds; "
            f"give -c rounds=N with more than {former.rounds} to go on"
        )
    if now.rounds < done:
        raise ConfigError(f"rounds: run {run} has {done} rounds behind it; give at least as many")
    return wanted


def _refuse_running(folder: Path, run: str) -> None:
    for cloud in running_clouds():
        if any(s.run == run and s.folder == folder and not s.ended for s in submissions(cloud)):
            raise ConfigError(
                f"run {run} is still going on at the cloud {cloud.name!r}, which brings it back by itself; "
                f"`espalier stop {run}` ends it"
            )
    if is_locked(folder):
        raise ConfigError(
            f"run {run} is still going on (process {holder(folder)}); wait for its end, or end it with "
            f"`espalier stop {run}`"
        )


@contextlib.contextmanager
def at_work(folder: Path, patience: float = LOCK_PATIENCE) -> Iterator[None]:
    """Be the only process that works on a run; the kernel lets go when its process dies.

    Raises
    ------
    StateError
        Another process still does after `patience` seconds, or the folder cannot be written to.
    """
    try:
        lock = FolderLock(folder, patience)
    except FolderInUseError as error:
        raise StateError(
            f"process {error.holder} works on the run in {folder}; stop it, or wait until it ends"
        ) from None
    try:
        yield
    finally:
        lock.release()
