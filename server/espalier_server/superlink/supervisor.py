"""The cloud's process: keeps a stock SuperLink alive and brings unfinished runs back after a crash."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from espalier.errors import ConfigError, EspalierError, StateError
from espalier.monitor.logs import announce, is_json
from espalier.monitor.metrics import TreeCollector, serve_metrics
from espalier.names import check_name
from espalier.processes.ports import check_free
from espalier.security.certificates import check_served
from espalier.security.keys import EDGE_KEYS, KEYS_ONLY, KeyRegistry
from espalier.security.transport import Address, Security, parse_address
from espalier.storage.lock import FolderLock
from espalier_server.cloud_status import CloudSource, monitored
from espalier_server.processes import (
    Process,
    espalier_env,
    listens,
    process_alive,
    signals_ignored,
    spawn,
    stop,
)
from espalier_server.records.events import FINAL, read_from
from espalier_server.superlink import submission as runs
from espalier_server.superlink.clouds import Cloud, running_clouds
from espalier_server.superlink.edge_admission import EdgeAdmission
from espalier_server.superlink.log_forwarder import LogForwarder
from espalier_server.superlink.submission import Submission

log = logging.getLogger("espalier.cloud")

READY_SECONDS = 60.0
#: Pauses between restarts double from the first to the last of these; a SuperLink that lived long starts over.
BACKOFF_SECONDS = (1.0, 30.0)
LONG_LIFE_SECONDS = 60.0
#: A SuperLink that dies this often without ever having been ready will not come up by itself.
FUTILE_STARTS = 4
#: A run that dies this often without a new checkpoint in between is given up.
FUTILE_RUNS = 3
POLL_SECONDS = 0.5


def run_cloud(
    listen: str,
    control: str,
    state: Path,
    name: str = "default",
    security: Security | None = None,
    *,
    expose_control: bool = False,
    monitor: str = "",
    metrics: Address | None = None,
) -> None:
    """Serve edges at `listen` and this machine's commands at `control` until interrupted.

    Parameters
    ----------
    listen, control : str
        ``HOST:PORT`` of the Fleet API and of the Control API.
    state : Path
        Folder of this cloud; one process at a time.
    name : str
        What ``espalier run --cloud`` calls it; one running cloud of a name per user.
    security : Security
        TLS files for both ports. With a certificate, only the edges of `state`/edge-keys.json are admitted.
    expose_control : bool
        Allow a control address beyond this machine. Whoever reaches it can submit code.
    monitor : str
        ``HOST:PORT`` of the live view; "" for the default one, "none" for none.
    metrics : Address, optional
        Where to answer Prometheus.

    Raises
    ------
    EspalierError
        An address, a name, a certificate or the state folder cannot be used, or the SuperLink never comes up.
    """
    security = security or Security()
    check_name(name, "--name")
    state = state.expanduser().resolve()
    fleet_address, control_address = parse_address(listen), parse_address(control)
    if not control_address.is_loopback and not expose_control:
        raise ConfigError(
            f"--control {control_address} is open to other machines, and whoever reaches it can submit code; "
            "use 127.0.0.1:PORT, or --expose-control to allow it"
        )
    check_served(security, listen, own_roots=True, host=control_address.host)
    security.server_certificates(control)
    if any(cloud.name == name and cloud.folder != state for cloud in running_clouds()):
        raise ConfigError(f"a cloud named {name!r} already runs on this machine; give another --name")
    lock = FolderLock(state)
    source = CloudSource(name, str(fleet_address), state)
    try:
        check_free(fleet_address, "--listen")
        check_free(control_address, "--control")
        with ExitStack() as stack:
            looked_on = stack.enter_context(monitored(source, monitor, security))
            if metrics is not None:
                stack.callback(serve_metrics(metrics, TreeCollector(source)))
            if is_json():
                stack.enter_context(LogForwarder(state / "superlink.log", "flwr.superlink"))
            cloud = Cloud(
                name=name,
                listen=str(fleet_address),
                control=str(control_address),
                pid=os.getpid(),
                state=str(state),
                root_certificates=_roots(security),
                monitor=looked_on.address if looked_on else "",
            )

            def tell(ready: bool) -> None:
                source.ready = ready
                if looked_on:
                    looked_on.set_health(ready)

            source.cloud = cloud
            registry = KeyRegistry(state / EDGE_KEYS) if security.keys_only else None
            supervisor = Supervisor(cloud, security, tell, registry)
            try:
                supervisor.run()
            finally:
                with signals_ignored():
                    supervisor.close()
                    cloud.unregister()
    finally:
        lock.release()


def _roots(security: Security) -> str:
    """Return the file that the SuperLink's own processes check its certificate against; empty without TLS."""
    if security.certificate is None:
        return ""
    return str((security.root_certificates or security.certificate).expanduser().resolve())


@dataclass
class Watched:
    """What the supervisor knows of an unfinished run."""

    submission: Submission
    offset: int
    pid: int | None = None
    ended: bool = False
    deaths: int = 0

    def look(self) -> None:
        """Read what its event log says since the last look."""
        events, self.offset = read_from(self.submission.events, self.offset)
        for event in events:
            if event["event"] == "run":
                self.pid = event.get("pid")
            elif event["event"] == "checkpoint":
                self.deaths = 0
            elif event["event"] in FINAL:
                self.ended = True

    @property
    def dead(self) -> bool:
        """Whether its ServerApp ended without a last word."""
        return not self.ended and self.pid is not None and not process_alive(self.pid)


class Supervisor:
    """Starts the SuperLink again when it dies, and submits unfinished runs again.

    Parameters
    ----------
    cloud : Cloud
        How this cloud is found.
    security : Security
        TLS files of the SuperLink.
    tell_ready : callable
        Called with whether the SuperLink serves, when that changes.
    registry : KeyRegistry, optional
        Edges that the SuperLink admits; None admits every one.
    """

    def __init__(
        self,
        cloud: Cloud,
        security: Security,
        tell_ready: Callable[[bool], None] = lambda ready: None,
        registry: KeyRegistry | None = None,
    ) -> None:
        self._tell_ready = tell_ready
        self.cloud = cloud
        self.security = security
        self.admission = None if registry is None else EdgeAdmission(cloud, registry)
        self.process: Process | None = None
        self.watched: dict[str, Watched] = {}
        self._suspects: set[str] = set()

    def run(self) -> None:
        """Supervise until interrupted; see `run_cloud`."""
        pause, futile = BACKOFF_SECONDS[0], 0
        first = True
        while True:
            started = time.monotonic()
            try:
                self._start()
                futile = 0
                if self.admission is not None:
                    self.admission.start_over()
                self._tell_ready(True)
                if first:
                    announce(f"cloud {self.cloud.name!r} is ready: edges at {self.cloud.listen}")
                first = False
                self._bring_back()
                self._attend()
            except EspalierError as error:
                futile += 1
                if futile >= (1 if first else FUTILE_STARTS):
                    raise
                log.error("%s", error)
            self.close()
            if time.monotonic() - started > LONG_LIFE_SECONDS:
                pause = BACKOFF_SECONDS[0]
            log.warning("the SuperLink ended; starting it again in %g s", pause)
            time.sleep(pause)
            pause = min(2 * pause, BACKOFF_SECONDS[1])

    def close(self) -> None:
        """End the SuperLink and what it started."""
        self._tell_ready(False)
        if self.process is not None:
            stop([self.process])
            self.process = None

    # --- the SuperLink -----------------------------------------------------------------------------

    def _start(self) -> None:
        """Start the SuperLink and wait until both its ports answer."""
        self.cloud.register()
        folder = self.cloud.folder
        env = {
            **espalier_env(),
            "FLWR_HOME": str(self.cloud.flwr_home),
            "ESPALIER_STATE": self.cloud.state,
            KEYS_ONLY: "1" if self.admission is not None else "",
        }
        process = spawn("flower-superlink", self._command(), folder / "superlink.log", env)
        self.process = process
        addresses = [parse_address(text).reachable for text in (self.cloud.listen, self.cloud.control)]
        deadline = time.monotonic() + READY_SECONDS
        while not all(listens(*address) for address in addresses):
            if not process.running:
                words = process.last_lines()
                raise StateError(f"flower-superlink ended at once: {words} (log: {process.log})")
            if time.monotonic() > deadline:
                raise StateError(
                    f"flower-superlink is not ready after {READY_SECONDS:g} s (log: {process.log})"
                )
            time.sleep(0.1)

    def _command(self) -> list[str]:
        control = parse_address(self.cloud.control)
        command = [
            str(Path(sys.executable).parent / "flower-superlink"),
            "--isolation=subprocess",
            "--disable-runtime-dependency-installation",
            f"--fleet-api-address={self.cloud.listen}",
            f"--host={control.host}",
            f"--port={control.port}",
        ]
        if self.security.certificate is None:
            return [*command, "--insecure"]
        return [
            *command,
            f"--ssl-certfile={self.security.certificate.expanduser().resolve()}",
            f"--ssl-keyfile={Path(str(self.security.private_key)).expanduser().resolve()}",
            f"--ssl-ca-certfile={self.cloud.root_certificates}",
            *(["--enable-supernode-auth"] if self.admission is not None else []),
        ]

    def _attend(self) -> None:
        """Watch the SuperLink and the runs until the SuperLink ends."""
        while self.process is not None and self.process.running:
            time.sleep(POLL_SECONDS)
            if self.admission is not None:
                self.admission.follow()
            self._look_after_runs()

    # --- the runs ----------------------------------------------------------------------------------

    def _bring_back(self) -> None:
        """Submit again what a SuperLink that died, or an earlier cloud on this state, left unfinished."""
        self.watched.clear()
        for submission in runs.submissions(self.cloud):
            if submission.ended or not submission.folder.is_dir():
                runs.forget(self.cloud, submission)
            else:
                self._submit_again(Watched(submission, submission.offset))

    def _look_after_runs(self) -> None:
        for submission in runs.submissions(self.cloud):
            watched = self.watched.get(submission.run)
            if watched is None or watched.submission.flower_run != submission.flower_run:
                self.watched[submission.run] = Watched(submission, submission.offset)
        for run, watched in list(self.watched.items()):
            if watched.ended:
                continue
            watched.look()
            if not watched.dead:
                self._suspects.discard(run)
            elif run not in self._suspects:
                self._suspects.add(run)  # its last word may be on its way; look once more
            else:
                self._suspects.discard(run)
                self._submit_again(watched)

    def _submit_again(self, watched: Watched) -> None:
        """Bring a run back from its checkpoint, unless that is futile."""
        watched.look()
        watched.deaths += 1
        old = watched.submission
        if watched.deaths > FUTILE_RUNS:
            reason = f"its ServerApp died {watched.deaths} times without a new checkpoint; see superlink.log"
            runs.close_log(old, "failed", reason)
            watched.ended = True
            return
        if old.flower_run:
            # A SuperLink that lived on may still hold the dead ServerApp for running.
            with contextlib.suppress(EspalierError):
                runs.flwr(self.cloud, "stop", old.flower_run, runs.CONNECTION)
        log.warning("run %s lost its ServerApp; submitting it again", old.run)
        try:
            new = runs.submit(self.cloud, old.config)
        except EspalierError as error:
            log.error("run %s cannot be submitted again: %s", old.run, error)
            runs.close_log(old, "failed", str(error))
            watched.ended = True
            return
        self.watched[old.run] = Watched(new, new.offset, deaths=watched.deaths)
