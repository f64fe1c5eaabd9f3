"""Who is kept out: live links without the right certificate, name or key; and a whole tree that has them all."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from bench.stock import running
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from espalier.flower.node_state import load_key
from espalier.flower.resident import ResidentNode
from espalier.flower.upstreams import Upstream
from espalier.monitor.node_log import event_logger
from espalier.security.certificates import Pair
from espalier.security.keys import CLIENT_KEYS, EDGE_KEYS, KeyRegistry, fingerprint
from espalier.security.refusals import Refusals
from espalier.wire import control
from espalier_edge.fleet.server import InlineFleet
from espalier_edge.key_admission import KeyAdmission
from espalier_edge.roster import Roster
from espalier_proto import espalier_pb2 as pb
from espalier_server.certificate_authority import issue, new_authority
from espalier_server.processes import espalier_command, espalier_env
from espalier_server.records.events import read_events
from tests.support.flower_helpers import fleet, online
from tests.support.processes import free_port, wait_until

log = logging.getLogger("espalier.test")


@pytest.fixture(scope="module")
def authority() -> Pair:
    return new_authority("ours", 1)


def served(authority: Pair, pair: Pair) -> dict[str, Any]:
    return {"certificates": (authority.certificate, pair.certificate, pair.private_key)}


class Node:
    """A resident node in a thread, with a note of what happened to it."""

    def __init__(self, state: Path, upstream: Upstream, name: str, key: Path | None) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.name = name
        logs = event_logger(log, f"espalier clients add {name} {state / 'node.pub'} --state DIR")

        def note(kind: str, facts: dict[str, Any]) -> None:
            logs(kind, facts)
            self.events.append((kind, facts))

        self.node = ResidentNode(self.answer, [upstream], state, node_config={}, key=key, on_event=note)
        self.public_key = public_key_to_bytes(load_key(key or state / "node.key").public_key())
        self.thread = threading.Thread(target=self.node.run)

    def answer(self, message: Message, context: Context) -> Message:
        """Say hello as a client does."""
        hello = pb.ClientHello(schema=control.SCHEMA, name=self.name, samples=2, image_shape=[1, 8, 8])
        hello.classes.extend(["a", "b"])
        hello.histogram.counts.extend([1, 1])
        return Message(control.control_content(hello), reply_to=message)

    def was(self, kind: str) -> list[str]:
        """Return the reasons of the events of one kind."""
        return [str(facts.get("reason")) for k, facts in list(self.events) if k == kind]


@contextmanager
def node(state: Path, upstream: Upstream, name: str = "cam", key: Path | None = None) -> Iterator[Node]:
    one = Node(state, upstream, name, key)
    one.thread.start()
    try:
        yield one
    finally:
        one.node.stop()
        one.thread.join(10)


# --- certificates ----------------------------------------------------------------------------------


def good(ours: Pair) -> Pair:
    return issue(ours, ["localhost"], 1)


CASES: list[tuple[str, Callable[[Pair], Pair | None], Callable[[Pair], bytes | None], str]] = [
    ("no TLS at the node", good, lambda ours: None, "closed the connection; if it speaks TLS"),
    ("no TLS at the server", lambda ours: None, lambda ours: ours.certificate, "does not speak TLS"),
    ("wrong CA", good, lambda ours: new_authority("ours", 1).certificate, "no authority in --root-cert"),
    (
        "expired",
        lambda ours: issue(ours, ["localhost"], -60 / 86400),
        lambda ours: ours.certificate,
        "has expired; renew it",
    ),
    (
        "wrong name",
        lambda ours: issue(ours, ["edge.example", "127.0.0.1"], 1),
        lambda ours: ours.certificate,
        "is not valid for this address",
    ),
]


@pytest.mark.parametrize(("server", "roots", "reason"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_node_without_the_right_certificates_does_not_connect(
    tmp_path: Path,
    authority: Pair,
    caplog: pytest.LogCaptureFixture,
    server: Callable[[Pair], Pair | None],
    roots: Callable[[Pair], bytes | None],
    reason: str,
) -> None:
    pair, held = server(authority), roots(authority)
    with fleet("localhost:0", **(served(authority, pair) if pair else {})) as ours:
        with node(tmp_path, Upstream(f"localhost:{ours.port}", held, insecure=held is None)) as one:
            wait_until(lambda: one.was("unreachable"), 20, "the node's complaint")
            assert reason in one.was("unreachable")[0]
            assert not one.was("connected")
        assert not ours.fleet.state.nodes
    assert "no secure connection to localhost" in caplog.text


def test_nodes_with_two_authorities_reach_both_servers(tmp_path: Path, authority: Pair) -> None:
    new = new_authority("ours", 1)  # of the same name, as after `certs init --renew`
    both = new.certificate + authority.certificate
    for number, signer in enumerate((authority, new)):
        with (
            fleet("localhost:0", **served(signer, good(signer))) as ours,
            node(tmp_path / str(number), Upstream(f"localhost:{ours.port}", both)) as one,
        ):
            assert one.node.wait_connected(20)


# --- keys ------------------------------------------------------------------------------------------


@contextmanager
def guarded(folder: Path, authority: Pair) -> Iterator[tuple[InlineFleet, KeyRegistry, Upstream]]:
    """Run a Fleet server as an edge does where keys are required."""
    registry = KeyRegistry(folder / CLIENT_KEYS)
    refused = Refusals(registry, "espalier clients add", logging.getLogger("espalier.edge"))
    options = served(authority, good(authority)) | {"require_keys": True, "on_refused": refused}
    with fleet("localhost:0", **options) as server:
        admission = KeyAdmission(server, registry)
        admission.start()
        try:
            yield server, registry, Upstream(f"localhost:{server.port}", authority.certificate)
        finally:
            admission.stop()


def test_keys_are_added_and_revoked_at_run_time(
    tmp_path: Path, authority: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with (
        guarded(tmp_path, authority) as (server, registry, upstream),
        node(tmp_path / "cam", upstream) as one,
    ):
        assert "no client is registered" in caplog.text
        wait_until(lambda: one.was("refused"), 20, "the refusal")
        assert "not registered there" in one.was("refused")[0]
        assert f"to admit it, there: espalier clients add cam {tmp_path / 'cam' / 'node.pub'}" in caplog.text
        wait_until(lambda: "it is not registered; to admit it: espalier clients add" in caplog.text, 10)
        assert fingerprint(one.public_key) in caplog.text
        assert not server.nodes()

        KeyRegistry(registry.path).add("cam", (tmp_path / "cam" / "node.pub").read_bytes())
        assert one.node.wait_connected(30)
        assert [n.name for n in server.nodes()] == ["cam"]

        grid = server.open_run()
        KeyRegistry(registry.path).revoke("cam")
        wait_until(lambda: not server.nodes(), 10, "the drop")
        wait_until(lambda: len(one.was("refused")) == 2, 20, "the second refusal")
        wait_until(lambda: "it is cam's, which was revoked" in caplog.text, 10)
        assert "client cam is no longer admitted" in caplog.text
        (reply,) = grid.exchange([Message(RecordDict(), online_id(server), "train")], deadline=10)
        assert reply.has_error()

        KeyRegistry(registry.path).forget("cam")
        KeyRegistry(registry.path).add("cam", one.public_key)  # on second thoughts
        assert one.node.wait_connected(30)


def online_id(server: InlineFleet) -> int:
    """Return the id that the only node ever known had."""
    (node_id,) = server.fleet.state.nodes
    return node_id


def test_requests_to_a_revoked_node_count_as_lost(tmp_path: Path, authority: Pair) -> None:
    asked = threading.Event()
    with (
        guarded(tmp_path, authority) as (server, registry, upstream),
        node(tmp_path / "cam", upstream) as one,
    ):
        registry.add("cam", one.public_key)
        (node_id,) = online(server, 1)
        release = threading.Event()

        def hang(message: Message, context: Context) -> Message:
            asked.set()
            release.wait(20)
            return Message(RecordDict(), reply_to=message)

        one.node._shared.app = hang
        replies: list[Message] = []
        grid = server.open_run()
        call = threading.Thread(
            target=lambda: replies.extend(
                grid.exchange([Message(RecordDict(), node_id, "train")], deadline=60)
            )
        )
        call.start()
        assert asked.wait(20)
        registry.revoke("cam")
        call.join(15)
        assert not call.is_alive()
        assert replies[0].has_error()
        release.set()


def test_a_name_belongs_to_its_registered_key(tmp_path: Path, authority: Pair) -> None:
    with guarded(tmp_path, authority) as (server, registry, upstream), ExitStack() as stack:
        honest = stack.enter_context(node(tmp_path / "a", upstream, "cam-1"))
        liar = stack.enter_context(node(tmp_path / "b", upstream, "cam-1"))
        registry.add("cam-1", honest.public_key)
        registry.add("cam-2", liar.public_key)
        online(server, 2)
        roster = Roster(server, registry)
        roster.refresh(server.open_run(), ConfigRecord(), 20)
        (known,) = roster.clients().values()
        assert {n.node_id: n.public_key for n in server.nodes()}[known.node_id] == honest.public_key
        (fault,) = roster.faults
        assert (fault.node, fault.kind) == ("cam-1", "refused")
        assert "registered as 'cam-2'" in fault.detail


def test_a_node_is_activated_with_its_own_key_only(tmp_path: Path, authority: Pair) -> None:
    victim, thief = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    with guarded(tmp_path, authority) as (server, registry, upstream):
        registry.add("cam", public_key_to_bytes(victim.public_key()))
        wait_until(lambda: server.fleet.state.nodes, 10, "the registration")
        credentials = grpc.ssl_channel_credentials(authority.certificate)
        with grpc.secure_channel(upstream.address, credentials) as channel:
            request = ActivateNodeRequest(
                public_key=public_key_to_bytes(victim.public_key()), heartbeat_interval=10
            )
            signed = NodeAuthClientInterceptor(thief, thief.public_key())
            with pytest.raises(grpc.RpcError) as caught:
                FleetStub(grpc.intercept_channel(channel, signed)).ActivateNode(request, timeout=10)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            signed = NodeAuthClientInterceptor(victim, victim.public_key())
            assert (
                FleetStub(grpc.intercept_channel(channel, signed)).ActivateNode(request, timeout=10).node_id
            )


# --- a whole tree ----------------------------------------------------------------------------------


class SecureTree:
    """Real processes of all tiers with TLS and keys on both links, set up by our own commands."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.env = {
            **os.environ,
            **espalier_env(),
            "XDG_STATE_HOME": str(folder / "xdg"),
            "OMP_NUM_THREADS": "1",
        }
        self.fleet, control_port = (free_port() for _ in range(2))
        self.do("certs", "init")
        self.do("certs", "cloud", "--host", "localhost")
        self.do("certs", "edge", "--name", "edge-1", "--host", "localhost")
        for name in ("c0", "c1"):
            self.do("certs", "client", "--name", name)
            for state in ("edge-1", "cloud"):
                self.do("clients", "add", name, f"certs/{name}/node.pub", "--state", state)
        self.do("edges", "add", "edge-1", "certs/edge-1/node.pub", "--state", "cloud")
        control = ("--control", f"127.0.0.1:{control_port}")
        listen = ("--listen", f"127.0.0.1:{self.fleet}", "--state", "cloud")
        self.cloud = self.start("cloud", "cloud", *listen, *control, *self.tls("cloud"))
        wait_until(lambda: "is ready" in self.log("cloud"), 90, "the cloud")

    def start_rest(self) -> None:
        """Start the edge and its clients."""
        home = ("--cloud", f"localhost:{self.fleet}", "--listen", "localhost:0", "--state", "edge-1")
        key = ("--key", "certs/edge-1/node.key")
        self.start("edge-1", "edge", "--name", "edge-1", *home, *key, *self.tls("edge-1"))
        address = self.folder / "edge-1" / "address"
        wait_until(lambda: address.exists() and address.read_text().endswith("\n"), 60, "the edge")
        for number, name in enumerate(("c0", "c1")):
            own = ("--state", name, "--key", f"certs/{name}/node.key", "--data", f"digits:{number}/16")
            roots = ("--root-certificates", f"certs/{name}/ca.pem", "--threads", "1")
            self.start(name, "client", "--name", name, "--edge", address.read_text().strip(), *own, *roots)
        names = ("edge-1", "c0", "c1")
        wait_until(lambda: all("connected to" in self.log(name) for name in names), 180, "the nodes")

    def do(self, *arguments: str) -> str:
        """Run a command to its end."""
        done = subprocess.run(
            espalier_command(*arguments),
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a process that stays; its folder is the tree's."""
        command = [
            sys.executable,
            "-c",
            f"import os; os.chdir({str(self.folder)!r}); from espalier.cli import main; main()",
        ]
        return self.stack.enter_context(
            running([*command, *arguments], self.folder / f"{name}.log", self.env)
        )

    def tls(self, name: str) -> list[str]:
        folder = f"certs/{name}"
        files = {
            "--certificate": "server.pem",
            "--private-key": "server.key",
            "--root-certificates": "ca.pem",
        }
        return [word for flag, file in files.items() for word in (flag, f"{folder}/{file}")]

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def superlink(self) -> psutil.Process | None:
        """Return the SuperLink that runs now, if any."""
        for process in psutil.Process(self.cloud.pid).children():
            if any("flower-superlink" in word for word in process.cmdline()):
                return process
        return None


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes as Linux shows them")
def test_a_secure_tree_survives_a_killed_superlink(tmp_path: Path) -> None:
    with ExitStack() as stack:
        tree = SecureTree(tmp_path, stack)
        tree.start_rest()
        out = tmp_path / "out"
        small = ("method=fedavg", "model=mlp", "rounds=16", "rg=2", "min-edges=1", "min-clients=2")
        settings = [word for text in small for word in ("-c", text)]
        run = tree.start("run", "run", "--out", str(out), *settings)
        wait_until(lambda: happened(out, "checkpoint"), 180, "the first window")
        link = tree.superlink()
        assert link is not None
        listening = {
            c.laddr.ip.removeprefix("::ffff:") for c in link.net_connections() if c.status == "LISTEN"
        }
        assert listening == {"127.0.0.1"}  # as --listen and --control say, and nothing beside
        link.kill()

        # Meanwhile a client's key is tried at the cloud, and so is a key nobody knows.
        roots = (tmp_path / "certs" / "ca.pem").read_bytes()
        upstream = Upstream(f"localhost:{tree.fleet}", roots)
        client = stack.enter_context(node(tmp_path / "x", upstream, "edge-1", tmp_path / "certs/c0/node.key"))
        wait_until(lambda: client.was("refused"), 180, "the refusal")
        assert "not registered there" in client.was("refused")[0]
        assert not client.was("connected")
        wait_until(lambda: fingerprint(client.public_key) in tree.log("cloud"), 90, "the cloud's own word")
        assert "to admit it: espalier edges add NAME KEY.pub" in tree.log("cloud")

        wait_until(lambda: run.poll() is not None, 300, "the end of the run")
        assert run.returncode == 0, tree.log("run")
        report = json.loads((out / "report.json").read_text())
        assert report["status"] == "finished"
        assert [w["participants"] for w in report["windows"]] == [["c0", "c1"]] * 8
        assert len(happened(out, "run")) == 2
        assert tree.log("cloud").count("edge edge-1 is admitted") == 2

        # An edge that is revoked is out at once; another one is let in without a restart.
        tree.do("edges", "revoke", "edge-1", "--state", "cloud")
        wait_until(lambda: "refuses this node" in tree.log("edge-1"), 120, "the edge's end")
        assert "espalier edges add edge-1 certs/edge-1/node.pub" in tree.log("edge-1")
        KeyRegistry(tmp_path / "cloud" / EDGE_KEYS).add("edge-2", client.public_key)
        wait_until(lambda: client.was("connected"), 120, "the new edge")


def happened(out: Path, kind: str) -> list[dict[str, Any]]:
    """Return a run's events of one kind."""
    events = read_events(out / "events.jsonl") if (out / "events.jsonl").exists() else []
    return [event for event in events if event["event"] == kind]
