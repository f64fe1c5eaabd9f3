"""`make test-docker`: build the image, start docker-compose.yml, train on it and check its properties."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
IMAGE, BARE, LOCAL_BASE, BASE = "espalier-check", "espalier-bare", "espalier-base", "debian:bookworm-slim"
PROJECT = "espalier-check"
RUN = "demo"

FIRST_WINDOW_SECONDS = 90.0
EXTRA_MB = 200.0
RUN_SECONDS = 1800.0
USER = "10001"
#: The services that run until they are stopped.
LONG_RUNNING = ("cloud", "edge-1", "edge-2", "client")

#: Run inside a container: connect to HOST PORT and print "connected" or the name of the error.
CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()
except OSError as error:
    print(type(error).__name__)
else:
    print("connected")
"""
#: Run inside a container: print the TLS version negotiated with HOST PORT; verify the certificate against ROOTS.
HANDSHAKE = """
import socket, ssl, sys
host, port, roots = sys.argv[1], int(sys.argv[2]), sys.argv[3]
context = ssl.create_default_context(cafile=roots)
context.set_alpn_protocols(["h2"])
with socket.create_connection((host, port), 5) as plain, context.wrap_socket(plain, server_hostname=host) as link:
    print(link.version())
"""
#: Run inside a container: print the arguments of its processes, one per line.
ARGUMENTS = """
from pathlib import Path
for file in Path("/proc").glob("[0-9]*/cmdline"):
    print(file.read_text().replace("\\0", "\\n"))
"""
#: Run inside a container: print its CPU time in seconds, from cgroup v1 or v2.
PROCESSOR = """
from pathlib import Path
files = [Path("/sys/fs/cgroup/cpuacct/cpuacct.usage"), Path("/sys/fs/cgroup/cpu.stat")]
first = next(path for path in files if path.exists()).read_text().split()
print(int(first[1]) / 1e6 if first[0] == "usage_usec" else int(first[0]) / 1e9)
"""


class CheckError(Exception):
    """A check failed; the message says which."""


def main() -> int:
    """Run all checks; return exit status 0 if all of them pass, else 1."""
    try:
        compose = find_compose()
        base, builder = find_base()
        env = dict(os.environ, COMPOSE_PROJECT_NAME=PROJECT, IMAGE=IMAGE, BASE=base, BUILDER=builder, RUN=RUN)
        env.update({name: env.get(name, "") for name in ("SETTINGS", "TORCH_INDEX")})
        failures = build(compose, env)
        with running_cluster(compose, env) as cluster:
            failures += Check(cluster).run_all()
    except CheckError as error:
        failures = [str(error)]
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    if not failures:
        print("all checks passed")
    return 1 if failures else 0


# --- the image -----------------------------------------------------------------------------------------


def find_compose() -> list[str]:
    """Return the command of compose v2, or of v1 if v2 is not installed."""
    if shutil.which("docker") is None:
        raise CheckError("docker is not installed; `make test` does not need it")
    if not succeeds("docker", "info"):
        raise CheckError("the docker daemon does not respond; start it, or set DOCKER_HOST to its address")
    if succeeds("docker", "compose", "version"):
        return ["docker", "compose"]
    if shutil.which("docker-compose") is None:
        raise CheckError("compose is not installed; install docker's plugin or docker-compose")
    return ["docker-compose"]


def find_base() -> tuple[str, str]:
    """Return the base images for running and for building; make local ones if none can be pulled."""
    if "BASE" in os.environ:
        return os.environ["BASE"], os.environ.get("BUILDER", os.environ["BASE"])
    if has_image(BASE) or succeeds("docker", "pull", "--quiet", BASE):
        return BASE, os.environ.get("BUILDER", BASE)
    if not (has_image(LOCAL_BASE) and has_image(f"{LOCAL_BASE}-builder")):
        print(f"{BASE} cannot be pulled; making a local base with debootstrap")
        command = [str(ROOT / "docker" / "local-base.sh"), LOCAL_BASE]
        if subprocess.run(command, check=False).returncode != 0:
            raise CheckError(f"no base image: pull {BASE}, or name a Debian 12 image with BASE=IMAGE")
    return LOCAL_BASE, f"{LOCAL_BASE}-builder"


def has_image(name: str) -> bool:
    """Return whether the daemon has an image of this name."""
    return succeeds("docker", "image", "inspect", name)


def build(compose: list[str], env: dict[str, str]) -> list[str]:
    """Build the image and the reference image; return the size check's failures."""
    started = time.monotonic()
    # compose v1: the classic builder works with every daemon. compose v2 uses BuildKit where it is installed.
    if compose == ["docker-compose"]:
        env["DOCKER_BUILDKIT"] = "0"
    show(*compose, "build", "certs", env=env)
    say(f"built {IMAGE} in {time.monotonic() - started:.0f} s")
    names = [
        word for name in ("BASE", "BUILDER", "TORCH_INDEX") for word in ("--build-arg", f"{name}={env[name]}")
    ]
    file = str(ROOT / "docker" / "bare.Dockerfile")
    show("docker", "build", *names, "--tag", BARE, "--file", file, str(ROOT), env=env)
    sizes = {
        name: int(call("docker", "image", "inspect", "--format", "{{.Size}}", name)) / 1e6
        for name in (IMAGE, BARE)
    }
    extra = sizes[IMAGE] - sizes[BARE]
    say(f"image {sizes[IMAGE]:.0f} MB; torch, diffusers and flwr alone {sizes[BARE]:.0f} MB; {extra:+.0f} MB")
    return [f"the image is {extra:.0f} MB larger than its three libraries"] if extra > EXTRA_MB else []


# --- the cluster ---------------------------------------------------------------------------------------


class Cluster:
    """The running compose project: finds its containers and runs commands in them."""

    def __init__(self, compose: list[str], env: dict[str, str]) -> None:
        self.compose, self.env = compose, env
        self.started = time.time()

    def __call__(self, *arguments: str) -> str:
        """Run a command of compose."""
        return call(*self.compose, *arguments, env=self.env)

    def containers(self, service: str) -> list[str]:
        """Return the ids of a service's containers, stopped ones included."""
        return call("docker", "ps", "--all", "--quiet", *self._labels(service)).split()

    def container(self, service: str) -> str:
        """Return the id of a service's only container."""
        ids = self.containers(service)
        expect(len(ids) == 1, f"{service} has {len(ids)} containers")
        return ids[0]

    def inside(self, container: str, *command: str) -> str:
        """Run a command in a container and return its output."""
        return call("docker", "exec", container, *command).strip()

    def can(self, container: str, *command: str) -> bool:
        """Return whether a command succeeds in a container."""
        return succeeds("docker", "exec", container, *command)

    def python(self, container: str, program: str, *arguments: str) -> str:
        """Run a Python program in a container and return its output."""
        return call("docker", "exec", container, "python", "-c", program, *arguments).strip()

    @staticmethod
    def _labels(service: str) -> list[str]:
        labels = [f"project={PROJECT}", f"service={service}"]
        return [word for label in labels for word in ("--filter", f"label=com.docker.compose.{label}")]


@contextlib.contextmanager
def running_cluster(compose: list[str], env: dict[str, str]) -> Iterator[Cluster]:
    """Start the project with empty volumes; remove it and its volumes on exit."""
    cluster = Cluster(compose, env)
    cluster("down", "--volumes", "--remove-orphans")
    try:
        cluster.started = time.time()
        cluster("up", "--detach", "--no-build")
        yield cluster
    except BaseException:
        print(call(*compose, "logs", "--tail", "30", env=env), file=sys.stderr)
        raise
    finally:
        cluster("down", "--volumes", "--remove-orphans", "--timeout", "20")


class Check:
    """The checks of a running cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def run_all(self) -> list[str]:
        """Run the checks in the order of a run's life; return the time limits that were exceeded.

        Raises
        ------
        CheckError
            Any other check failed.
        """
        seconds = self.first_window()
        self.networks()
        self.tls()
        self.rights()
        self.health()
        self.memory()
        self.end()
        self.scaling()
        late = f"the first window took {seconds:.0f} s, more than {FIRST_WINDOW_SECONDS:.0f}"
        return [late] if seconds > FIRST_WINDOW_SECONDS else []

    def first_window(self) -> float:
        """Return the seconds from `up` to the end of the first window; print their breakdown."""
        window = wait(lambda: self._event("window-end"), 900, "the first window", self._check_run_is_alive)
        used = sum(
            float(self.cluster.python(c, PROCESSOR)) for s in LONG_RUNNING for c in self.cluster.containers(s)
        )
        since = {event["event"]: event["time"] - self.cluster.started for event in reversed(self._events())}
        steps = ", ".join(f"{name} {since[name]:.1f} s" for name in ("run", "joined", "window-start"))
        say(f"first window finished {since['window-end']:.1f} s after `up` ({steps})")
        load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
        say(f"  CPU time of the containers {used:.0f} s, on {os.cpu_count()} cores; load average {load}")
        expect(window["window"] == 1, f"the first window has number {window['window']}")
        return float(since["window-end"])

    def networks(self) -> None:
        """Check that clients reach edges only, and edges the cloud but not its Control port."""
        cloud, edge, client = (
            self.cluster.container("cloud"),
            self.cluster.container("edge-1"),
            self.cluster.containers("client")[0],
        )
        networks = json.loads(
            call("docker", "inspect", "--format", "{{json .NetworkSettings.Networks}}", cloud)
        )
        addresses = [network["IPAddress"] for network in networks.values()]
        for host in ("cloud", *addresses):
            found = self.cluster.python(client, CONNECT, host, "9092")
            expect(found != "connected", f"a client reaches the cloud at {host}:9092")
            say(f"client -> {host}:9092: {found}")
        for container, host, port in (
            (client, "edge-1", "9093"),
            (client, "edge-2", "9093"),
            (edge, "cloud", "9092"),
        ):
            expect(
                self.cluster.python(container, CONNECT, host, port) == "connected",
                f"{host}:{port} is not reached",
            )
        expect(
            self.cluster.python(edge, CONNECT, "cloud", "8000") != "connected",
            "an edge reaches the Control port",
        )
        say("client -> edges, edge -> cloud: connected; edge -> Control port of the cloud: refused")

    def tls(self) -> None:
        """Check that cloud and edges serve TLS with a valid certificate, and refuse plain connections."""
        edge, client = self.cluster.container("edge-1"), self.cluster.containers("client")[0]
        for container, host, port, roots in (
            (client, "edge-1", "9093", "/state/ca.pem"),
            (client, "edge-2", "9093", "/state/ca.pem"),
            (edge, "cloud", "9092", "/state/tls/ca.pem"),
        ):
            version = self.cluster.python(container, HANDSHAKE, host, port, roots)
            expect(version in ("TLSv1.2", "TLSv1.3"), f"{host} negotiates {version}")
            say(f"{host}:{port} negotiates {version}")
        health = ("espalier", "health", "edge-1:9093")
        expect(
            self.cluster.can(client, *health, "--root-certificates", "/state/ca.pem"), "edge-1 is not healthy"
        )
        expect(not self.cluster.can(client, *health, "--insecure"), "edge-1 responds without TLS")

    def rights(self) -> None:
        """Check that no container runs as root, can write its root file system or has the authority's key."""
        for service in LONG_RUNNING:
            for container in self.cluster.containers(service):
                user = self.cluster.inside(container, "id", "-u")
                expect(user == USER, f"{service} runs as {user}")
                expect(not self.cluster.can(container, "touch", "/app/x"), f"{service} can write /app")
                keys = self.cluster.inside(container, "find", "/state", "/runs", "-name", "ca.key")
                expect(not keys, f"{service} has the authority's key")
        say(f"all run as user {USER} on a read-only file system")

    def health(self) -> None:
        """Wait until every container of a long-running service is healthy."""
        for service in LONG_RUNNING:
            for container in self.cluster.containers(service):
                wait(partial(is_healthy, container), 120, f"{service} to be healthy")
        clients = self.cluster.containers("client")
        expect(len(clients) == 4, f"there are {len(clients)} clients")
        say("cloud, 2 edges and 4 clients are healthy")

    def memory(self) -> None:
        """Check that every container has a memory limit; print what each uses."""
        ids = [i for s in (*LONG_RUNNING, "run") for i in self.cluster.containers(s)]
        for container in ids:
            limit = int(call("docker", "inspect", "--format", "{{.HostConfig.Memory}}", container))
            expect(limit > 0, f"{container} has no memory limit")
        print(call("docker", "stats", "--no-stream", "--format", "{{.Name}}: {{.MemUsage}}", *ids).strip())

    def end(self) -> None:
        """Wait until the run ends; check its status and the report in the volume."""
        run = self.cluster.container("run")
        wait(lambda: state_of(run, "Status") == "exited", RUN_SECONDS, "the end of the run")
        code = state_of(run, "ExitCode")
        expect(code == "0", f"`run` ended with status {code}")
        report = json.loads(self._read(f"/runs/{RUN}/report.json"))
        expect(report["status"] == "finished", f"the report says {report['status']}")
        page = self._read(f"/runs/{RUN}/report.html")
        expect("<html" in page, "report.html is no HTML page")
        for window in report["windows"]:
            signatures = window["signatures"]
            expect(signatures["cloud"] > 0 and not signatures["unsigned"], f"signatures are {signatures}")
        seconds, windows = time.time() - self.cluster.started, len(report["windows"])
        say(f"run finished {seconds:.0f} s after `up`: {windows} windows, all signed; report in the volume")
        if folder := os.environ.get("OUT"):
            call("docker", "cp", f"{self.cluster.container('cloud')}:/runs/{RUN}", folder)

    def scaling(self) -> None:
        """Add two clients; check that each client has its own name, node key and share of the data."""
        self.cluster(
            "up", "--detach", "--no-build", "--scale", "client=6", "cloud", "edge-1", "edge-2", "client"
        )
        clients = self.cluster.containers("client")
        expect(len(clients) == 6, f"{len(clients)} clients instead of 6")
        for container in clients:
            wait(partial(is_healthy, container), 180, "an added client to be healthy")
        places = sorted(self.cluster.inside(container, "readlink", "/tmp/state") for container in clients)
        expect(places == [f"/state/client-{number}" for number in range(1, 7)], f"places {places}")
        shares = {
            word for c in clients for word in self.cluster.python(c, ARGUMENTS).split("\n") if ":" in word
        }
        shares = {share for share in shares if share.startswith("digits:")}
        expect(len(shares) == 6, f"shares {sorted(shares)}")
        say(f"scaled to 6 clients: {', '.join(sorted(shares))}")

    # --- what the checks read ------------------------------------------------------------------------------------

    def _read(self, path: str) -> str:
        return self.cluster.inside(self.cluster.container("cloud"), "cat", path)

    def _events(self) -> list[dict[str, Any]]:
        """Return the events of the run so far."""
        log = f"/runs/{RUN}/events.jsonl"
        if not self.cluster.can(self.cluster.container("cloud"), "test", "-f", log):
            return []
        return [json.loads(line) for line in self._read(log).splitlines() if line.endswith("}")]

    def _event(self, name: str) -> dict[str, Any] | None:
        """Return the first event of a name, or None."""
        return next((event for event in self._events() if event["event"] == name), None)

    def _check_run_is_alive(self) -> None:
        for container in self.cluster.containers("run"):
            if state_of(container, "Status") == "exited":
                raise CheckError("`run` ended before its first window")


# --- helpers -------------------------------------------------------------------------------------------


def call(*command: str, env: dict[str, str] | None = None) -> str:
    """Run a command in the checkout and return its output; raise CheckError if it fails."""
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    expect(done.returncode == 0, f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def succeeds(*command: str) -> bool:
    """Return whether a command succeeds in the checkout."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


def show(*command: str, env: dict[str, str]) -> None:
    """Run a long command without capturing its output; raise CheckError if it fails."""
    done = subprocess.run(command, cwd=ROOT, env=env, check=False)
    expect(done.returncode == 0, f"`{' '.join(command)}` ended with {done.returncode}")


def state_of(container: str, field: str) -> str:
    """Return a field of a container's state."""
    return call("docker", "inspect", "--format", f"{{{{.State.{field}}}}}", container).strip()


def is_healthy(container: str) -> bool:
    """Return whether a container's health check passes."""
    return state_of(container, "Health.Status") == "healthy"


def wait(
    ready: Callable[[], T | None], seconds: float, what: str, check: Callable[[], None] = lambda: None
) -> T:
    """Poll `ready()` until its value is true and return it; `check` may raise to stop earlier."""
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        check()
        expect(time.monotonic() < deadline, f"timed out after {seconds:.0f} s, waiting for {what}")
        time.sleep(0.5)
    return found


def expect(condition: bool, failure: str) -> None:
    """Raise CheckError with a message unless a condition holds."""
    if not condition:
        raise CheckError(failure)


def say(text: str) -> None:
    """Print a line and flush it."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
