"""The cloud's process: restarts a stock SuperLink that ends, and resubmits unfinished runs after a crash."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
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
    signals_ignored,
    spawn,
    stop,
)
from espalier_server.superlink import submission as runs
from espalier_server.superlink.clouds import Cloud, running_clouds
from espalier_server.superlink.edge_admission import EdgeAdmission
from espalier_server.superlink.log_forwarder import LogForwarder
from espalier_server.superlink.watched_run import WatchedRun

log = logging.getLogger("espalier.cloud")

#: Seconds in which both ports of the SuperLink must answer after its start.
READY_SECONDS = 60.0
#: Shortest and longest pause before a restart of the SuperLink; it doubles with each restart.
BACKOFF_SECONDS = (1.0, 30.0)
#: Seconds of operation after which the pause is reset to the shortest one.
BACKOFF_RESET_SECONDS = 60.0
#: Number of consecutive failed starts of the SuperLink after which the cloud ends.
MAX_FAILED_STARTS = 4
#: Number of ends of a ServerApp without a new checkpoint in between after which its run is not resubmitted.
MAX_FAILED_RUNS = 3
#: Seconds between checks of the SuperLink, the registry of edges and the runs.
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
        State folder of this cloud; one process at a time can use it.
    name : str
        Name for ``espalier run --cloud``, unique among the user's running clouds.
    security : Security
        TLS files for both ports. With a certificate, only the edges of `state`/edge-keys.json are admitted.
    expose_control : bool
        Allow a control address that other machines can reach. Whoever can reach it can submit code.
    monitor : str
        ``HOST:PORT`` of the monitoring service; "" for the default address, "none" for no service.
    metrics : Address, optional
        Address of the Prometheus endpoint.

    Raises
    ------
    EspalierError
        An address, the name, a certificate or the state folder cannot be used, or the SuperLink does not start.
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
            monitor_server = stack.enter_context(monitored(source, monitor, security))
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
                monitor=monitor_server.address if monitor_server else "",
            )

            def set_ready(ready: bool) -> None:
                source.ready = ready
                if monitor_server:
                    monitor_server.set_health(ready)

            source.cloud = cloud
            registry = KeyRegistry(state / EDGE_KEYS) if security.keys_only else None
            supervisor = Supervisor(cloud, security, set_ready, registry)
            try:
                supervisor.run()
            finally:
                with signals_ignored():
                    supervisor.close()
                    cloud.unregister()
    finally:
        lock.release()


def _roots(security: Security) -> str:
    """Return the PEM file with which the SuperLink's own processes verify its certificate; "" without TLS."""
    if security.certificate is None:
        return ""
    return str((security.root_certificates or security.certificate).expanduser().resolve())


class Supervisor:
    """Restarts the SuperLink when it ends, and resubmits unfinished runs.

    Parameters
    ----------
    cloud : Cloud
        The cloud's entry in the registry of clouds.
    security : Security
        TLS files of the SuperLink.
    set_ready : callable
        Called with True once the SuperLink serves, and with False when it ends.
    registry : KeyRegistry, optional
        Edges that the SuperLink admits; None admits all.
    """

    def __init__(
        self,
        cloud: Cloud,
        security: Security,
        set_ready: Callable[[bool], None] = lambda ready: None,
        registry: KeyRegistry | None = None,
    ) -> None:
        self._set_ready = set_ready
        self.cloud = cloud
        self.security = security
        self.admission = None if registry is None else EdgeAdmission(cloud, registry)
        self.process: Process | None = None
        self.watched: dict[str, WatchedRun] = {}
        self._suspects: set[str] = set()

    def run(self) -> None:
        """Supervise until interrupted; see `run_cloud`."""
        pause, failed_starts = BACKOFF_SECONDS[0], 0
        first = True
        while True:
            started = time.monotonic()
            try:
                self._start()
                failed_starts = 0
                if self.admission is not None:
                    self.admission.register_all()
                self._set_ready(True)
                if first:
                    announce(f"cloud {self.cloud.name!r} is ready: edges at {self.cloud.listen}")
                first = False
                self._resubmit_unfinished()
                self._watch()
            except EspalierError as error:
                failed_starts += 1
                if failed_starts >= (1 if first else MAX_FAILED_STARTS):
                    raise
                log.error("%s", error)
            self.close()
            if time.monotonic() - started > BACKOFF_RESET_SECONDS:
                pause = BACKOFF_SECONDS[0]
            log.warning("the SuperLink ended; restarting it in %g s", pause)
            time.sleep(pause)
            pause = min(2 * pause, BACKOFF_SECONDS[1])

    def close(self) -> None:
        """End the SuperLink and its child processes."""
        self._set_ready(False)
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
                raise StateError(
                    f"flower-superlink ended at once: {process.last_lines()} (log: {process.log})"
                )
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

    def _watch(self) -> None:
        """Watch the SuperLink and the runs until the SuperLink ends."""
        while self.process is not None and self.process.running:
            time.sleep(POLL_SECONDS)
            if self.admission is not None:
                self.admission.update()
            self._check_runs()

    # --- the runs ----------------------------------------------------------------------------------

    def _resubmit_unfinished(self) -> None:
        """Resubmit the runs that the previous SuperLink, or an earlier cloud with this state, did not finish."""
        self.watched.clear()
        for submission in runs.submissions(self.cloud):
            if submission.ended or not submission.folder.is_dir():
                runs.forget(self.cloud, submission)
            else:
                self._resubmit(WatchedRun(submission, submission.offset))

    def _check_runs(self) -> None:
        """Read the events of the runs, and resubmit those whose ServerApp ended without a final event."""
        for submission in runs.submissions(self.cloud):
            watched = self.watched.get(submission.run)
            if watched is None or watched.submission.flower_run != submission.flower_run:
                self.watched[submission.run] = WatchedRun(submission, submission.offset)
        for run, watched in list(self.watched.items()):
            if watched.ended:
                continue
            watched.read_events()
            if not watched.dead:
                self._suspects.discard(run)
            elif run not in self._suspects:
                self._suspects.add(run)  # its final event may not be visible yet; check again
            else:
                self._suspects.discard(run)
                self._resubmit(watched)

    def _resubmit(self, watched: WatchedRun) -> None:
        """Resubmit a run, which resumes from its checkpoint, unless it has failed `MAX_FAILED_RUNS` times."""
        watched.read_events()
        watched.deaths += 1
        old = watched.submission
        if watched.deaths > MAX_FAILED_RUNS:
            reason = f"its ServerApp ended {watched.deaths} times without a new checkpoint; see superlink.log"
            runs.close_log(old, "failed", reason)
            watched.ended = True
            return
        if old.flower_run:
            # If the SuperLink did not end, it may still list the ServerApp as running.
            with contextlib.suppress(EspalierError):
                runs.flwr(self.cloud, "stop", old.flower_run, runs.CONNECTION)
        log.warning("the ServerApp of run %s ended unexpectedly; resubmitting the run", old.run)
        try:
            new = runs.submit(self.cloud, old.config)
        except EspalierError as error:
            log.error("run %s cannot be resubmitted: %s", old.run, error)
            runs.close_log(old, "failed", str(error))
            watched.ended = True
            return
        self.watched[old.run] = WatchedRun(new, new.offset, deaths=watched.deaths)
