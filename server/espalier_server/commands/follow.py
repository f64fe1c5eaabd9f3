"""Submits a run and follows it to its end, for `espalier run` and `espalier demo`."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from espalier.config.fields import FlatValue
from espalier.errors import EspalierError, StateError
from espalier_server.commands.run_view import RunView
from espalier_server.processes import signals_interrupt
from espalier_server.records.events import EVENTS_FILE, FINAL, read_events, read_from
from espalier_server.superlink.clouds import Cloud
from espalier_server.superlink.submission import Submission, flower_status, forget, stop_run, submit

#: Seconds that an interrupted run has for a clean end.
STOP_SECONDS = 60.0
#: Seconds without a first event after which the run's status is requested from Flower.
_SILENT_SECONDS = 20.0
_TICK_SECONDS = 0.25


def prepare(settings: Mapping[str, FlatValue], out: Path) -> dict[str, FlatValue]:
    """Validate the settings before anything starts, and complete them.

    Returns
    -------
    dict
        The settings as given, with an absolute ``out`` and a ``run-id``.

    Raises
    ------
    ConfigError
        A setting is invalid.
    StateError
        `out` cannot be used, or holds another run.
    """
    from espalier.methods.run_config import RunConfig  # late: the methods load Flower

    out = out.expanduser().resolve()
    given = dict(settings)
    config = RunConfig.from_flat(given)
    run = config.run_id or f"{config.method}-{uuid.uuid4().hex[:8]}"
    check_folder(out, run)
    return {**given, "out": str(out), "run-id": run}


def check_folder(out: Path, run: str) -> None:
    """Check that a folder can be, or already is, the folder of `run`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StateError(
            f"--out {out} cannot be used: {error.strerror}; give a folder this user may write"
        ) from error
    starts = (event for event in read_events(out / EVENTS_FILE) if event["event"] == "run")
    other_runs = sorted({str(event.get("run")) for event in starts} - {run})
    if other_runs:
        old = other_runs[0]
        raise StateError(
            f"--out {out} holds the run {old}; give another folder, or -c run-id={old} to resume it"
        )


def run_to_end(
    cloud: Cloud,
    settings: Mapping[str, FlatValue],
    view: RunView,
    check: Callable[[RunView], None] = lambda view: None,
    submitted: Callable[[], None] = lambda: None,
) -> str:
    """Submit a run, show its progress, and return its status when it has ended: "finished" or "stopped".

    Ctrl-C (or SIGTERM) stops the run cleanly; after a second one, the run is no longer waited for.

    Parameters
    ----------
    check : callable
        Called with the view several times a second; an exception that it raises is passed on.
    submitted : callable
        Called once, as soon as the run is submitted.

    Raises
    ------
    EspalierError
        The run cannot be submitted, or it failed; with the reason.
    KeyboardInterrupt
        It was interrupted; the run has been stopped.
    """
    submission = submit(cloud, settings)
    with signals_interrupt():
        try:
            submitted()
            return _follow(cloud, submission, view, check)
        except KeyboardInterrupt:
            view.print_line(f"stopping run {submission.run} …")
            stop_run(cloud, submission, STOP_SECONDS)
            _show_rest(submission, view)
            raise


def _follow(cloud: Cloud, submission: Submission, view: RunView, check: Callable[[RunView], None]) -> str:
    offset, started, asked = submission.offset, False, time.monotonic()
    while True:
        events, offset = read_from(submission.events, offset)
        for event in events:
            started = True
            view.feed(event)
            if event["event"] in FINAL:
                forget(cloud, submission)
                if event["event"] == "failed":
                    raise EspalierError(
                        f"run {submission.run} failed: {event.get('reason') or 'no reason given'}"
                    )
                return str(event["event"])
        view.tick()
        check(view)
        if not cloud.running:
            raise EspalierError(
                f"the cloud {cloud.name!r} has ended; start it again with --state {cloud.state}, and it resumes "
                "the run from the last checkpoint"
            )
        if not started and time.monotonic() - asked > _SILENT_SECONDS:
            _ask_flower(cloud, submission)
            asked = time.monotonic()
        time.sleep(_TICK_SECONDS)


def _ask_flower(cloud: Cloud, submission: Submission) -> None:
    """Raise EspalierError if the ServerApp ended before it wrote an event."""
    status, details = flower_status(cloud, submission)
    if status.startswith("finished"):
        forget(cloud, submission)
        reason = re.sub(r"^ServerApp failed with exception: ", "", details)
        raise EspalierError(
            f"run {submission.run} failed: {reason} (see `flwr log` and {cloud.state}/superlink.log)"
        )


def _show_rest(submission: Submission, view: RunView) -> None:
    """Show the final event of a run that was stopped, if there is one."""
    events, _ = read_from(submission.events, submission.offset)
    for event in events:
        if event["event"] in FINAL:
            view.feed(event)


def describe_result(out: Path, status: str) -> str:
    """Return a line that lists the results of a run that has ended."""
    made = [name for name in ("report.html", "samples.png", "model") if (out / name).exists()]
    return f"{status}; in {out}: {', '.join(made) or 'no results'}"
