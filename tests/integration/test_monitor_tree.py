"""A real tree with TLS is looked on while it trains: status, watch, health, preflight, metrics and JSON logs."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from espalier.security.transport import Security
from espalier_server.commands.status_client import ask_status, watch
from espalier_server.processes import espalier_command, espalier_env
from tests.support.certificates import Authority
from tests.support.paths import ROOT
from tests.support.processes import free_port, running, wait_until


def test_a_tree_is_monitored_while_it_trains(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = map(str, authority.issue("server"))
    roots = ["--root-certificates", str(authority.roots)]
    tls = [*roots, "--certificate", certificate, "--private-key", key, "--trust-on-first-use"]
    env = {**os.environ, **espalier_env(), "XDG_STATE_HOME": str(tmp_path / "xdg"), "OMP_NUM_THREADS": "1"}
    fleet, control, monitor, edge, metrics = (free_port() for _ in range(5))

    def here(port: int) -> str:
        return f"127.0.0.1:{port}"

    def start(stack: ExitStack, tier: str, name: str, *arguments: str) -> Callable[[], str]:
        log = tmp_path / f"{name}.log"
        command = espalier_command(tier, "--state", str(tmp_path / name), "--log-format", "json", *arguments)
        stack.enter_context(running(command, log, env))
        return log.read_text

    def espalier(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = espalier_command(*arguments)
        return subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
        )

    with ExitStack() as stack:
        cloud = start(
            stack,
            "cloud",
            "cloud",
            "--listen",
            here(fleet),
            "--control",
            here(control),
            "--monitor",
            here(monitor),
            *tls,
        )
        edge_options = ["--name", "edge-1", "--cloud", here(fleet), "--listen", here(edge), *tls]
        at_edge = start(stack, "edge", "edge-1", *edge_options, "--metrics-port", str(metrics))
        client_options = ["--name", "c0", "--edge", here(edge), "--data", "digits:0/16", *roots]
        client = start(stack, "client", "c0", *client_options, "--threads", "1")
        wait_until(lambda: "is ready" in cloud(), 90, "the cloud")
        wait_until(lambda: "connected to" in client() and "connected to" in at_edge(), 90, "edge and client")

        # Between runs: the edge is not known by name yet, and no run goes on.
        idle = espalier("status")
        assert idle.returncode == 3, idle.stderr
        assert espalier("health", here(monitor), *roots).stdout == f"{here(monitor)} is serving\n"
        assert espalier("health", here(monitor)).returncode == 1  # not without the roots
        assert espalier("health", "--state", str(tmp_path / "c0")).returncode == 0
        checked = espalier("preflight", "client", "--state", str(tmp_path / "other"), *client_options)
        assert checked.returncode == 0, checked.stdout

        small = (
            "learning-rate=0.0001",
            "rounds=40",
            "rg=2",
            "sample-steps=2",
            "sample-count=1",
            "min-clients=1",
        )
        settings = [word for setting in (*small, "method=fedavg") for word in ("-c", setting)]
        submitted = espalier("run", "--detach", "--out", str(tmp_path / "out"), *settings)
        assert submitted.returncode == 0, submitted.stderr
        security = Security(root_certificates=authority.roots)
        seen: list[str] = []
        for status in watch(here(monitor), security, 0.2):
            seen += [c.state for c in status.clients]
            if status.totals.windows >= 1 and {"training"} <= set(seen):
                break
        status = ask_status(here(monitor), security)
        assert (status.run.run, status.run.status) == (submitted.stdout.strip(), "running")
        [seen_edge], [seen_client] = status.edges, status.clients
        assert (seen_edge.name, seen_edge.connected, dict(seen_edge.versions)["flwr"][:4]) == (
            "edge-1",
            True,
            "1.39",
        )
        assert (seen_client.name, seen_client.samples, seen_client.steps_per_second > 0) == ("c0", 90, True)

        shown = espalier("status", "--format", "json", "--address", here(monitor), *roots)
        assert shown.returncode == 0, shown.stderr
        told = json.loads(shown.stdout)
        assert told["troubles"] == []
        assert told["cloud"]["superlink"] is True
        with urllib.request.urlopen(f"http://{here(metrics)}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        assert 'espalier_link_bytes_total{direction="up",link="client-edge"}' in text
        assert "process_resident_memory_bytes" in text

        stopped = espalier("stop", submitted.stdout.strip())
        assert stopped.returncode == 0, stopped.stderr
        assert espalier("status").returncode == 3
        events = [json.loads(line) for line in at_edge().splitlines()]
        assert any(e.get("run") == submitted.stdout.strip() and e.get("round") == 1 for e in events)
        assert any(e["logger"].startswith("flwr") for e in map(json.loads, cloud().splitlines()))
