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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGE, BARE, LOCAL_BASE, BASE = "espalier-check", "espalier-bare", "espalier-base", "debian:bookworm-slim"
PROJECT = "espalier-check"
RUN = "demo"

FIRST_WINDOW_SECONDS = 90.0
SIZE_MB = 200.0
END_SECONDS = 1800.0
USER = "10001"

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


class Failed(Exception):
    """Something is not as promised; the text says what."""


def main() -> int:
    """Check everything; the exit status is 0 if all holds."""
    try:
        compose = find_compose()
        base, builder = find_base()
        env = dict(os.environ, COMPOSE_PROJECT_NAME=PROJECT, IMAGE=IMAGE, BASE=base, BUILDER=builder, RUN=RUN)
        env.update({name: env.get(name, "") for name in ("SETTINGS", "TORCH_INDEX")})
        build(compose, env)
        with cluster(compose, env) as up:
            Check(up).everything()
    except Failed as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    print("all holds")
    return 0


# --- the image -----------------------------------------------------------------------------------------


def find_compose() -> list[str]:
    """Return the command of compose v2, or else of v1."""
    if shutil.which("docker") is None:
        raise Failed("docker is not installed; `make test` needs none")
    if call("docker", "info", check=False) is None:
        raise Failed("no docker daemon answers; start it, or set DOCKER_HOST to its address")
    if call("docker", "compose", "version", check=False) is not None:
        return ["docker", "compose"]
    if shutil.which("docker-compose") is None:
        raise Failed("docker has no compose; install its plugin, or docker-compose")
    return ["docker-compose"]


def find_base() -> tuple[str, str]:
    """Return the images to run and to build on; local ones are made where none can be pulled."""
    if "BASE" in os.environ:
        return os.environ["BASE"], os.environ.get("BUILDER", os.environ["BASE"])
    if has_image(BASE) or call("docker", "pull", "--quiet", BASE, check=False) is not None:
        return BASE, os.environ.get("BUILDER", BASE)
    if not (has_image(LOCAL_BASE) and has_image(f"{LOCAL_BASE}-builder")):
        print(f"{BASE} cannot be pulled; making a local base with debootstrap")
        command = [str(ROOT / "docker" / "local-base.sh"), LOCAL_BASE]
        if subprocess.run(command, check=False).returncode != 0:
            raise Failed(f"no base image: pull {BASE}, or give a Debian 12 by BASE=IMAGE")
    return LOCAL_BASE, f"{LOCAL_BASE}-builder"


def has_image(name: str) -> bool:
    """Whether the daemon has an image."""
    return call("docker", "image", "inspect", name, check=False) is not None


def build(compose: list[str], env: dict[str, str]) -> None:
    """Build the image and what it is measured against, and compare their sizes."""
    started = time.monotonic()
    # Classic builds keep their layers in any daemon; where BuildKit is there, compose v2 uses it by itself.
    if compose == ["docker-compose"]:
        env["DOCKER_BUILDKIT"] = "0"
    call(*compose, "build", "certs", env=env, show=True)
    say(f"built {IMAGE} in {time.monotonic() - started:.0f} s")
    names = [word for name in ("BASE", "BUILDER", "TORCH_INDEX") for word in ("--build-arg", f"{name}={env[name]}")]
    file = str(ROOT / "docker" / "bare.Dockerfile")
    call("docker", "build", *names, "--tag", BARE, "--file", file, str(ROOT), env=env, show=True)
    sizes = {name: int(call("docker", "image", "inspect", "--format", "{{.Size}}", name)) / 1e6 for name in (IMAGE, BARE)}
    more = sizes[IMAGE] - sizes[BARE]
    say(f"image {sizes[IMAGE]:.0f} MB; torch, diffusers and flwr alone {sizes[BARE]:.0f} MB; {more:+.0f} MB")
    expect(more <= SIZE_MB, f"the image is {more:.0f} MB larger than its three libraries, more than {SIZE_MB:.0f}")


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

    def inside(self, container: str, *command: str, check: bool = True) -> str | None:
        """Run a command in a container."""
        return call("docker", "exec", container, *command, check=check)

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

    def everything(self) -> None:
        """Go through all of it, in the order of a run's life."""
        self.first_window()
        self.networks()
        self.tls()
        self.rights()
        self.health()
        self.memory()
        self.end()
        self.scaling()

    def first_window(self) -> None:
        """The first window ends in time."""
        event = wait(lambda: self._event("window-end"), 600, "the first window", self._run_goes_on)
        seconds = event["time"] - self.up.started
        for name in ("run", "joined", "window-start"):
            say(f"  {name} after {self._event(name)['time'] - self.up.started:.1f} s")
        say(f"first window finished {seconds:.1f} s after `up`")
        expect(seconds < FIRST_WINDOW_SECONDS, f"that is more than {FIRST_WINDOW_SECONDS:.0f} s")

    def networks(self) -> None:
        """Clients reach edges and not the cloud; edges reach the cloud; nobody reaches its control port."""
        cloud, edge, client = self.up.container("cloud"), self.up.container("edge-1"), self.up.containers("client")[0]
        networks = json.loads(call("docker", "inspect", "--format", "{{json .NetworkSettings.Networks}}", cloud))
        addresses = [network["IPAddress"] for network in networks.values()]
        for host in ("cloud", *addresses):
            found = self.up.python(client, CONNECT, host, "9092")
            expect(found != "connected", f"a client reaches the cloud at {host}:9092")
            say(f"client -> {host}:9092: {found}")
        for container, host, port in ((client, "edge-1", "9093"), (client, "edge-2", "9093"), (edge, "cloud", "9092")):
            expect(self.up.python(container, CONNECT, host, port) == "connected", f"{host}:{port} is not reached")
        expect(self.up.python(edge, CONNECT, "cloud", "8000") != "connected", "an edge reaches the control port")
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
        expect(self.up.inside(client, *health, "--root-certificates", "/state/ca.pem") is not None, "edge-1 is ill")
        expect(self.up.inside(client, *health, "--insecure", check=False) is None, "edge-1 answers without TLS")

    def rights(self) -> None:
        """Nobody is root, root file systems are read-only, and secrets stay where they belong."""
        for service in ("cloud", "edge-1", "edge-2", "client"):
            for container in self.up.containers(service):
                user = (self.up.inside(container, "id", "-u") or "").strip()
                expect(user == USER, f"{service} runs as {user}")
                expect(self.up.inside(container, "touch", "/app/x", check=False) is None, f"{service} can write /app")
                held = self.up.inside(container, "find", "/state", "/runs", "-name", "ca.key") or ""
                expect(not held.strip(), f"{service} holds the authority's key")
        say(f"all run as user {USER} on a read-only file system")

    def health(self) -> None:
        """Every container that stays becomes healthy."""
        for service in ("cloud", "edge-1", "edge-2", "client"):
            for container in self.up.containers(service):
                wait(lambda c=container: health_of(c) == "healthy", 120, f"{service} to be healthy")
        clients = self.up.containers("client")
        expect(len(clients) == 4, f"there are {len(clients)} clients")
        say("cloud, 2 edges and 4 clients are healthy")

    def memory(self) -> None:
        """Every container has a limit; print what they take."""
        ids = [i for s in ("cloud", "edge-1", "edge-2", "client", "run") for i in self.up.containers(s)]
        for container in ids:
            limit = int(call("docker", "inspect", "--format", "{{.HostConfig.Memory}}", container))
            expect(limit > 0, f"{container} has no memory limit")
        print(call("docker", "stats", "--no-stream", "--format", "{{.Name}}: {{.MemUsage}}", *ids).strip())

    def end(self) -> None:
        """The run ends well, and its report is in the volume."""
        run = self.up.container("run")
        wait(lambda: state_of(run, "Status") == "exited", END_SECONDS, "the run's end")
        code = state_of(run, "ExitCode")
        expect(code == "0", f"`run` ended with status {code}")
        report = json.loads(self._read(f"/runs/{RUN}/report.json"))
        expect(report["status"] == "finished", f"the report says {report['status']}")
        page = self._read(f"/runs/{RUN}/report.html")
        expect("<html" in page, "there is no report.html")
        say(f"run finished {time.time() - self.up.started:.0f} s after `up`: {len(report['windows'])} windows; report in the volume")
        if folder := os.environ.get("OUT"):
            call("docker", "cp", f"{self.up.container('cloud')}:/runs/{RUN}", folder)

    def scaling(self) -> None:
        """Further clients get names, keys and shares of their own."""
        self.up("up", "--detach", "--no-build", "--scale", "client=6", "cloud", "edge-1", "edge-2", "client")
        clients = self.up.containers("client")
        expect(len(clients) == 6, f"{len(clients)} clients instead of 6")
        for container in clients:
            wait(lambda c=container: health_of(c) == "healthy", 180, "a further client to be healthy")
        places = sorted((self.up.inside(c, "readlink", "/tmp/state") or "").strip() for c in clients)
        expect(places == [f"/state/client-{n}" for n in range(1, 7)], f"places {places}")
        lines = [self.up.inside(c, "sh", "-c", "tr '\\0' ' ' < /proc/1/cmdline; cat /proc/*/cmdline | tr '\\0' ' '") or "" for c in clients]
        shares = {word for line in lines for word in line.split() if word.startswith("digits:")}
        expect(len(shares) == 6, f"shares {sorted(shares)}")
        say(f"scaled to 6 clients: {', '.join(sorted(shares))}")

    # --- looking ------------------------------------------------------------------------------------

    def _read(self, path: str) -> str:
        return self.up.inside(self.up.container("cloud"), "cat", path) or ""

    def _event(self, name: str) -> dict | None:
        """Return the first event of a name, None as long as there is none."""
        log = self.up.inside(self.up.container("cloud"), "cat", f"/runs/{RUN}/events.jsonl", check=False)
        events = (json.loads(line) for line in (log or "").splitlines() if line.endswith("}"))
        return next((event for event in events if event["event"] == name), None)

    def _run_goes_on(self) -> None:
        for container in self.up.containers("run"):
            if state_of(container, "Status") == "exited":
                raise Failed("`run` ended before its first window")


# --- helpers -------------------------------------------------------------------------------------------


def call(*command: str, env: dict[str, str] | None = None, check: bool = True, show: bool = False) -> str | None:
    """Run a command in the checkout; return its output, or None if it failed and `check` is false."""
    out = None if show else subprocess.PIPE
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=out, stderr=None if show else out, text=True, check=False)
    if done.returncode == 0:
        return done.stdout or ""
    if check:
        raise Failed(f"`{' '.join(command)}` ended with status {done.returncode}: {(done.stderr or '').strip()}")
    return None


def state_of(container: str, field: str) -> str:
    """Return a field of a container's state."""
    return (call("docker", "inspect", "--format", f"{{{{.State.{field}}}}}", container) or "").strip()


def health_of(container: str) -> str:
    """Return what a container's healthcheck says."""
    return state_of(container, "Health.Status")


def wait(ready: Callable[[], object], seconds: float, what: str, check: Callable[[], None] = lambda: None) -> object:
    """Wait until `ready()` is true and return what it returned."""
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        check()
        if time.monotonic() > deadline:
            raise Failed(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.5)
    return found


def expect(holds: bool, otherwise: str) -> None:
    """Fail unless something holds."""
    if not holds:
        raise Failed(otherwise)


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
