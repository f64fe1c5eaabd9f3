"""`make test-docker`: builds the image, starts docker-compose.yml, trains on it, and checks what it promises."""

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
SIZE_MB = 200.0
END_SECONDS = 1800.0
USER = "10001"
STAYING = ("cloud", "edge-1", "edge-2", "client")

#: Run inside a container: connects to HOST PORT and says what came of it.
CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()
except OSError as error:
    print(type(error).__name__)
else:
    print("connected")
"""
#: Run inside a container: the TLS version spoken with HOST PORT, whose certificate must fit.
HANDSHAKE = """
import socket, ssl, sys
host, port, roots = sys.argv[1], int(sys.argv[2]), sys.argv[3]
context = ssl.create_default_context(cafile=roots)
context.set_alpn_protocols(["h2"])
with socket.create_connection((host, port), 5) as plain, context.wrap_socket(plain, server_hostname=host) as link:
    print(link.version())
"""


#: Run inside a container: the arguments of its processes, a line each.
ARGUMENTS = """
from pathlib import Path
for file in Path("/proc").glob("[0-9]*/cmdline"):
    print(file.read_text().replace("\\0", "\\n"))
"""
#: Run inside a container: the processor seconds that it has used.
PROCESSOR = """
from pathlib import Path
found = [Path("/sys/fs/cgroup/cpuacct/cpuacct.usage"), Path("/sys/fs/cgroup/cpu.stat")]
first = next(path for path in found if path.exists()).read_text().split()
print(int(first[1]) / 1e6 if first[0] == "usage_usec" else int(first[0]) / 1e9)
"""


class CheckError(Exception):
    """Something is not as promised; the text says what."""


def main() -> int:
    """Check everything; the exit status is 0 if all holds."""
    try:
        compose = find_compose()
        base, builder = find_base()
        env = dict(os.environ, COMPOSE_PROJECT_NAME=PROJECT, IMAGE=IMAGE, BASE=base, BUILDER=builder, RUN=RUN)
        env.update({name: env.get(name, "") for name in ("SETTINGS", "TORCH_INDEX")})
        missed = build(compose, env)
        with cluster(compose, env) as up:
            missed += Check(up).everything()
    except CheckError as error:
        missed = [str(error)]
    for what in missed:
        print(f"FAILED: {what}", file=sys.stderr)
    if not missed:
        print("all holds")
    return 1 if missed else 0


# --- the image -----------------------------------------------------------------------------------------


def find_compose() -> list[str]:
    """Return the command of compose v2, or else of v1."""
    if shutil.which("docker") is None:
        raise CheckError("docker is not installed; `make test` needs none")
    if not succeeds("docker", "info"):
        raise CheckError("no docker daemon answers; start it, or set DOCKER_HOST to its address")
    if succeeds("docker", "compose", "version"):
        return ["docker", "compose"]
    if shutil.which("docker-compose") is None:
        raise CheckError("docker has no compose; install its plugin, or docker-compose")
    return ["docker-compose"]


def find_base() -> tuple[str, str]:
    """Return the images to run and to build on; local ones are made where none can be pulled."""
    if "BASE" in os.environ:
        return os.environ["BASE"], os.environ.get("BUILDER", os.environ["BASE"])
    if has_image(BASE) or succeeds("docker", "pull", "--quiet", BASE):
        return BASE, os.environ.get("BUILDER", BASE)
    if not (has_image(LOCAL_BASE) and has_image(f"{LOCAL_BASE}-builder")):
        print(f"{BASE} cannot be pulled; making a local base with debootstrap")
        command = [str(ROOT / "docker" / "local-base.sh"), LOCAL_BASE]
        if subprocess.run(command, check=False).returncode != 0:
            raise CheckError(f"no base image: pull {BASE}, or give a Debian 12 by BASE=IMAGE")
    return LOCAL_BASE, f"{LOCAL_BASE}-builder"


def has_image(name: str) -> bool:
    """Whether the daemon has an image."""
    return succeeds("docker", "image", "inspect", name)


def build(compose: list[str], env: dict[str, str]) -> list[str]:
    """Build the image and what it is measured against; return what is wrong with their sizes."""
    started = time.monotonic()
    # Classic builds keep their layers in any daemon; where BuildKit is there, compose v2 uses it by itself.
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
    more = sizes[IMAGE] - sizes[BARE]
    say(f"image {sizes[IMAGE]:.0f} MB; torch, diffusers and flwr alone {sizes[BARE]:.0f} MB; {more:+.0f} MB")
    return [f"the image is {more:.0f} MB larger than its three libraries"] if more > SIZE_MB else []


# --- the cluster ---------------------------------------------------------------------------------------


class Cluster:
    """The running project: its containers, and commands in them."""

    def __init__(self, compose: list[str], env: dict[str, str]) -> None:
        self.compose, self.env = compose, env
        self.started = time.time()

    def __call__(self, *arguments: str) -> str:
        """Run a command of compose."""
        return call(*self.compose, *arguments, env=self.env)

    def containers(self, service: str) -> list[str]:
        """Return the ids of a service's containers, also of ended ones."""
        return call("docker", "ps", "--all", "--quiet", *self._labels(service)).split()

    def container(self, service: str) -> str:
        """Return the id of a service's only container."""
        found = self.containers(service)
        expect(len(found) == 1, f"{service} has {len(found)} containers")
        return found[0]

    def inside(self, container: str, *command: str) -> str:
        """Run a command in a container and return its output."""
        return call("docker", "exec", container, *command).strip()

    def can(self, container: str, *command: str) -> bool:
        """Whether a command ends well in a container."""
        return succeeds("docker", "exec", container, *command)

    def python(self, container: str, program: str, *arguments: str) -> str:
        """Run a Python program in a container and return what it printed."""
        return call("docker", "exec", container, "python", "-c", program, *arguments).strip()

    @staticmethod
    def _labels(service: str) -> list[str]:
        labels = [f"project={PROJECT}", f"service={service}"]
        return [word for label in labels for word in ("--filter", f"label=com.docker.compose.{label}")]


@contextlib.contextmanager
def cluster(compose: list[str], env: dict[str, str]) -> Iterator[Cluster]:
    """Start the project from nothing, and remove it with its volumes in the end."""
    up = Cluster(compose, env)
    up("down", "--volumes", "--remove-orphans")
    try:
        up.started = time.time()
        up("up", "--detach", "--no-build")
        yield up
    except BaseException:
        print(call(*compose, "logs", "--tail", "30", env=env), file=sys.stderr)
        raise
    finally:
        up("down", "--volumes", "--remove-orphans", "--timeout", "20")


class Check:
    """What is asked of a running cluster."""

    def __init__(self, up: Cluster) -> None:
        self.up = up

    def everything(self) -> list[str]:
        """Go through all of it, in the order of a run's life; return which figures were missed."""
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
        """Return after how many seconds the first window is finished, and say what went into them."""
        window = wait(lambda: self._event("window-end"), 900, "the first window", self._run_goes_on)
        used = sum(float(self.up.python(c, PROCESSOR)) for s in STAYING for c in self.up.containers(s))
        since = {event["event"]: event["time"] - self.up.started for event in reversed(self._events())}
        steps = ", ".join(f"{name} {since[name]:.1f} s" for name in ("run", "joined", "window-start"))
        say(f"first window finished {since['window-end']:.1f} s after `up` ({steps})")
        load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
        say(f"  the containers used {used:.0f} s of {os.cpu_count()} processors; load average {load}")
        expect(window["window"] == 1, f"the first window has number {window['window']}")
        return float(since["window-end"])

    def networks(self) -> None:
        """Clients reach edges and not the cloud; edges reach the cloud; nobody reaches its control port."""
        cloud, edge, client = (
            self.up.container("cloud"),
            self.up.container("edge-1"),
            self.up.containers("client")[0],
        )
        networks = json.loads(
            call("docker", "inspect", "--format", "{{json .NetworkSettings.Networks}}", cloud)
        )
        addresses = [network["IPAddress"] for network in networks.values()]
        for host in ("cloud", *addresses):
            found = self.up.python(client, CONNECT, host, "9092")
            expect(found != "connected", f"a client reaches the cloud at {host}:9092")
            say(f"client -> {host}:9092: {found}")
        for container, host, port in (
            (client, "edge-1", "9093"),
            (client, "edge-2", "9093"),
            (edge, "cloud", "9092"),
        ):
            expect(
                self.up.python(container, CONNECT, host, port) == "connected", f"{host}:{port} is not reached"
            )
        expect(
            self.up.python(edge, CONNECT, "cloud", "8000") != "connected", "an edge reaches the control port"
        )
        say("client -> edges, edge -> cloud: connected; edge -> control port of the cloud: refused")

    def tls(self) -> None:
        """Both kinds of servers speak TLS with a certificate that fits, and nothing else."""
        edge, client = self.up.container("edge-1"), self.up.containers("client")[0]
        for container, host, port, roots in (
            (client, "edge-1", "9093", "/state/ca.pem"),
            (client, "edge-2", "9093", "/state/ca.pem"),
            (edge, "cloud", "9092", "/state/tls/ca.pem"),
        ):
            version = self.up.python(container, HANDSHAKE, host, port, roots)
            expect(version in ("TLSv1.2", "TLSv1.3"), f"{host} speaks {version}")
            say(f"{host}:{port} speaks {version}")
        health = ("espalier", "health", "edge-1:9093")
        expect(self.up.can(client, *health, "--root-certificates", "/state/ca.pem"), "edge-1 is ill")
        expect(not self.up.can(client, *health, "--insecure"), "edge-1 answers without TLS")

    def rights(self) -> None:
        """Nobody is root, root file systems are read-only, and secrets stay where they belong."""
        for service in STAYING:
            for container in self.up.containers(service):
                user = self.up.inside(container, "id", "-u")
                expect(user == USER, f"{service} runs as {user}")
                expect(not self.up.can(container, "touch", "/app/x"), f"{service} can write /app")
                held = self.up.inside(container, "find", "/state", "/runs", "-name", "ca.key")
                expect(not held, f"{service} holds the authority's key")
        say(f"all run as user {USER} on a read-only file system")

    def health(self) -> None:
        """Every container that stays becomes healthy."""
        for service in STAYING:
            for container in self.up.containers(service):
                wait(partial(is_healthy, container), 120, f"{service} to be healthy")
        clients = self.up.containers("client")
        expect(len(clients) == 4, f"there are {len(clients)} clients")
        say("cloud, 2 edges and 4 clients are healthy")

    def memory(self) -> None:
        """Every container has a limit; print what they take."""
        ids = [i for s in (*STAYING, "run") for i in self.up.containers(s)]
        for container in ids:
            limit = int(call("docker", "inspect", "--format", "{{.HostConfig.Memory}}", container))
            expect(limit > 0, f"{container} has no memory limit")
        print(call("docker", "stats", "--no-stream", "--format", "{{.Name}}: {{.MemUsage}}", *ids).strip())

    def end(self) -> None:
        """Wait until the run ends well, with its report in the volume."""
        run = self.up.container("run")
        wait(lambda: state_of(run, "Status") == "exited", END_SECONDS, "the run's end")
        code = state_of(run, "ExitCode")
        expect(code == "0", f"`run` ended with status {code}")
        report = json.loads(self._read(f"/runs/{RUN}/report.json"))
        expect(report["status"] == "finished", f"the report says {report['status']}")
        page = self._read(f"/runs/{RUN}/report.html")
        expect("<html" in page, "there is no report.html")
        for window in report["windows"]:
            signatures = window["signatures"]
            expect(signatures["cloud"] > 0 and not signatures["unsigned"], f"signatures are {signatures}")
        seconds, windows = time.time() - self.up.started, len(report["windows"])
        say(f"run finished {seconds:.0f} s after `up`: {windows} windows, all signed; report in the volume")
        if folder := os.environ.get("OUT"):
            call("docker", "cp", f"{self.up.container('cloud')}:/runs/{RUN}", folder)

    def scaling(self) -> None:
        """Further clients get names, keys and shares of their own."""
        self.up("up", "--detach", "--no-build", "--scale", "client=6", "cloud", "edge-1", "edge-2", "client")
        clients = self.up.containers("client")
        expect(len(clients) == 6, f"{len(clients)} clients instead of 6")
        for container in clients:
            wait(partial(is_healthy, container), 180, "a further client to be healthy")
        places = sorted(self.up.inside(container, "readlink", "/tmp/state") for container in clients)
        expect(places == [f"/state/client-{number}" for number in range(1, 7)], f"places {places}")
        shares = {word for c in clients for word in self.up.python(c, ARGUMENTS).split("\n") if ":" in word}
        shares = {share for share in shares if share.startswith("digits:")}
        expect(len(shares) == 6, f"shares {sorted(shares)}")
        say(f"scaled to 6 clients: {', '.join(sorted(shares))}")

    # --- looking ------------------------------------------------------------------------------------

    def _read(self, path: str) -> str:
        return self.up.inside(self.up.container("cloud"), "cat", path)

    def _events(self) -> list[dict[str, Any]]:
        """Return what happened so far."""
        log = f"/runs/{RUN}/events.jsonl"
        if not self.up.can(self.up.container("cloud"), "test", "-f", log):
            return []
        return [json.loads(line) for line in self._read(log).splitlines() if line.endswith("}")]

    def _event(self, name: str) -> dict[str, Any] | None:
        """Return the first event of a name, None as long as there is none."""
        return next((event for event in self._events() if event["event"] == name), None)

    def _run_goes_on(self) -> None:
        for container in self.up.containers("run"):
            if state_of(container, "Status") == "exited":
                raise CheckError("`run` ended before its first window")


# --- helpers -------------------------------------------------------------------------------------------


def call(*command: str, env: dict[str, str] | None = None) -> str:
    """Run a command in the checkout and return its output; raise CheckError if it fails."""
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    expect(done.returncode == 0, f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def succeeds(*command: str) -> bool:
    """Whether a command ends well."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


def show(*command: str, env: dict[str, str]) -> None:
    """Run a long command and let its output be seen; raise CheckError if it fails."""
    done = subprocess.run(command, cwd=ROOT, env=env, check=False)
    expect(done.returncode == 0, f"`{' '.join(command)}` ended with {done.returncode}")


def state_of(container: str, field: str) -> str:
    """Return a field of a container's state."""
    return call("docker", "inspect", "--format", f"{{{{.State.{field}}}}}", container).strip()


def is_healthy(container: str) -> bool:
    """Whether a container's healthcheck says so."""
    return state_of(container, "Health.Status") == "healthy"


def wait(
    ready: Callable[[], T | None], seconds: float, what: str, check: Callable[[], None] = lambda: None
) -> T:
    """Wait until `ready()` is true and return what it returned; `check` may give up earlier by raising."""
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        check()
        expect(time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s")
        time.sleep(0.5)
    return found


def expect(holds: bool, otherwise: str) -> None:
    """Fail unless something holds."""
    if not holds:
        raise CheckError(otherwise)


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
