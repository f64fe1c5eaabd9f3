"""The runs submitted to a cloud: submission with Flower's CLI, the records of them on disk, and stopping."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from espalier.config.fields import FlatValue
from espalier.errors import ConfigError, EspalierError, StateError
from espalier.storage.json_file import write_json
from espalier_server import FLOWER_APP
from espalier_server.processes import espalier_env
from espalier_server.records.events import EVENTS_FILE, FINAL, STOP_FILE, EventLog, read_from
from espalier_server.superlink.clouds import Cloud, running_clouds

log = logging.getLogger("espalier.cloud")

#: Name of the connection in the cloud's own Flower configuration.
CONNECTION = "espalier"
#: Seconds that a command of Flower's CLI may take.
FLWR_SECONDS = 120.0


@dataclass(frozen=True)
class Submission:
    """A run that was submitted to a cloud.

    Attributes
    ----------
    run : str
        Espalier's run id.
    out : str
        The run's folder.
    config : dict
        Flat settings as submitted, including the run id and `out`.
    flower_run : str
        Flower's run id of the last submission.
    offset : int
        Size of the event log in bytes at submission; the events of this submission follow it.
    """

    run: str
    out: str
    config: dict[str, FlatValue] = field(default_factory=dict)
    flower_run: str = ""
    offset: int = 0

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.out)

    @property
    def events(self) -> Path:
        """The run's event log."""
        return self.folder / EVENTS_FILE

    @property
    def ended(self) -> bool:
        """Whether the event log holds a final event of this submission."""
        events, _ = read_from(self.events, self.offset)
        return any(event["event"] in FINAL for event in events)


def submit(cloud: Cloud, config: Mapping[str, FlatValue]) -> Submission:
    """Submit a run to a cloud and record it in the cloud's state folder.

    Parameters
    ----------
    cloud : Cloud
        A running cloud.
    config : mapping
        Flat settings, including ``run-id`` and an absolute ``out``.

    Raises
    ------
    EspalierError
        Flower refuses the run; the message quotes Flower's.
    StateError
        The folder of the run or of the cloud cannot be written to.
    """
    out = Path(str(config["out"]))
    submission = Submission(run=str(config["run-id"]), out=str(out), config=dict(config))
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / STOP_FILE).unlink(missing_ok=True)
        size = submission.events.stat().st_size if submission.events.exists() else 0
    except OSError as error:
        raise StateError(f"cannot write {out}: {error.strerror}; give another --out") from error
    with tempfile.TemporaryDirectory(prefix="espalier-") as scratch:
        settings = Path(scratch) / "run.toml"
        # Strings, numbers and booleans are written alike in JSON and TOML.
        lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in config.items()]
        settings.write_text("".join(lines), encoding="utf-8")
        reply = flwr(cloud, "run", str(FLOWER_APP), CONNECTION, "--run-config", str(settings))
    submission = replace(submission, flower_run=str(reply["run-id"]), offset=size)
    remember(cloud, submission)
    return submission


def remember(cloud: Cloud, submission: Submission) -> None:
    """Write a submission to the cloud's state folder."""
    write_json(_folder(cloud) / f"{submission.run}.json", asdict(submission))


def forget(cloud: Cloud, submission: Submission) -> None:
    """Remove a submission from the cloud's state folder."""
    (_folder(cloud) / f"{submission.run}.json").unlink(missing_ok=True)


def submissions(cloud: Cloud) -> list[Submission]:
    """Return the submissions to a cloud, oldest first."""
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(_folder(cloud).glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
            with contextlib.suppress(OSError, ValueError, TypeError):
                found.append(Submission(**json.loads(path.read_text(encoding="utf-8"))))
    return found


def find_run(run: str) -> tuple[Cloud, Submission]:
    """Return the cloud and the submission of a run, by Espalier's or Flower's run id.

    Raises
    ------
    ConfigError
        No running cloud has this run.
    """
    known = []
    for cloud in running_clouds():
        for submission in submissions(cloud):
            if run in (submission.run, submission.flower_run):
                return cloud, submission
            if not submission.ended:
                known.append(submission.run)
    hint = f"running: {', '.join(known)}" if known else "no run is in progress"
    raise ConfigError(
        f"no run {run!r} on this machine's clouds ({hint}); give a run id as `espalier run` prints it"
    )


def flower_status(cloud: Cloud, submission: Submission) -> tuple[str, str]:
    """Return Flower's status of a run (e.g. ``"running"``, ``"finished:failed"``) and its details.

    Raises
    ------
    EspalierError
        The cloud does not answer, or does not have the run.
    """
    reply = flwr(cloud, "list", CONNECTION, "--run-id", submission.flower_run)
    row = reply["runs"][0]
    return str(row["status"]), str(row["status-details"])


def stop_run(cloud: Cloud, submission: Submission, timeout: float) -> bool:
    """Stop a run: request a clean end from its ServerApp, and after `timeout` seconds stop it with Flower's CLI.

    Returns
    -------
    bool
        Whether the ServerApp ended cleanly.

    Raises
    ------
    StateError
        The run's folder cannot be written to.
    """
    try:
        (submission.folder / STOP_FILE).touch()
    except OSError as error:
        raise StateError(
            f"cannot write {submission.folder}: {error.strerror}; run this command as that folder's owner"
        ) from error
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            if submission.ended:
                return True
            time.sleep(0.2)
        with contextlib.suppress(EspalierError):  # it may have ended in the meantime
            flwr(cloud, "stop", submission.flower_run, CONNECTION)
        if not submission.ended:
            close_log(submission, "stopped", f"did not end within {timeout:g} s and was ended by Flower")
        return False
    finally:
        (submission.folder / STOP_FILE).unlink(missing_ok=True)


def close_log(submission: Submission, event: str, reason: str) -> None:
    """Write the final event of a run whose ServerApp did not; if the disk is full, only log it."""
    try:
        events = EventLog(submission.events)
        events.write(event, reason=reason)
        events.close()
    except StateError as error:
        log.error(
            "run %s %s: %s; its final event could not be written: %s", submission.run, event, reason, error
        )


def flwr(cloud: Cloud, command: str, *arguments: str) -> dict[str, Any]:
    """Run a command of Flower's CLI at a cloud, and return its JSON output.

    Raises
    ------
    EspalierError
        The command fails or does not end; the message quotes Flower's.
    """
    tool = Path(sys.executable).parent / "flwr"
    env = {**os.environ, **espalier_env(), "FLWR_HOME": str(cloud.flwr_home)}
    try:
        done = subprocess.run(
            [str(tool), command, *arguments, "--format", "json"],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=FLWR_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EspalierError(
            f"`flwr {command}` did not end within {FLWR_SECONDS:g} s; is the cloud running?"
        ) from error
    except OSError as error:
        raise EspalierError(
            f"cannot start {tool}: {error.strerror}; reinstall espalier-fl in this environment"
        ) from error
    reply = _json(done.stdout)
    if done.returncode != 0 or not reply.get("success"):
        reason = reply.get("error-message") or done.stderr or done.stdout
        raise EspalierError(f"`flwr {command}` failed: {' '.join(str(reason).split()) or 'no reason given'}")
    return reply


def _json(text: str) -> dict[str, Any]:
    """Return the JSON object in an output, which notices may precede; {} if there is none."""
    start = text.find("{")
    with contextlib.suppress(ValueError):
        reply = json.loads(text[start:]) if start >= 0 else {}
        return reply if isinstance(reply, dict) else {}
    return {}


def _folder(cloud: Cloud) -> Path:
    return cloud.folder / "runs"
