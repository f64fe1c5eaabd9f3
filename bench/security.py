"""Measures what TLS and signatures cost an edge round: the same rounds plain, over TLS, and signed as well."""

from __future__ import annotations

import datetime
import ipaddress
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import ArrayRecord, Message

from bench.report import Outcome, Target, run
from bench.stock import environment, running, wait_until
from common.flower.arrays import array_from_numpy
from common.flower.inline import InlineFleet, InlineGrid
from common.flower.payloads import content_id
from common.wire import control
from common.wire.signature import check
from proto import espalier_pb2 as pb

ABOUT = "Wall time of an edge round of two clients that only send their payload back"
CLIENTS = 2
BIG, SMALL = 10_000_000, 100_000  # bytes
TENSORS = 300  # of the architecture that a statement covers: as many as a U-Net's
DEADLINE = 120.0
PLAIN, TLS, SIGNED = "plain", "TLS", "TLS, signatures"


@dataclass
class Setup:
    """An edge's Fleet server with its clients, and whether these sign."""

    server: InlineFleet
    grid: InlineGrid
    signs: bool
    processes: list[psutil.Process]

    def round(self, number: int, values: np.ndarray) -> tuple[float, float]:
        """Do a round as an edge does, without adding anything up; return its seconds, and those of processors."""
        nodes = {node.node_id: node.public_key for node in self.server.nodes()}
        worked = self._worked()
        began = time.perf_counter()
        record = ArrayRecord({"float32": array_from_numpy(values)})
        plans = {node: _plan(number, f"client-{node}") for node in nodes}
        messages = [
            Message(control.plan_content(plan, record), node, control.TRAIN) for node, plan in plans.items()
        ]
        answered = 0
        for reply in self.grid.exchange(messages, deadline=DEADLINE):
            node = reply.metadata.src_node_id
            report = control.read_control(pb.ClientReport, reply, plans[node].client)
            received = reply.content[control.ARRAYS]
            assert isinstance(received, ArrayRecord)
            if self.signs:
                check(plans[node], report, content_id(received), nodes[node])
            answered += 1
        taken = time.perf_counter() - began
        if answered != CLIENTS:
            raise RuntimeError(f"{answered} of {CLIENTS} clients answered")
        return taken, self._worked() - worked

    def _worked(self) -> float:
        """Return the processor seconds of the server and its clients so far."""
        return sum(times.user + times.system for times in (p.cpu_times() for p in self.processes))


def measure(tiny: bool) -> Outcome:
    """Time rounds of the setups in turn, so that whatever else the machine does falls on all of them."""
    size, warm, count = (SMALL, 1, 5) if tiny else (BIG, 3, 25)
    seconds: dict[str, list[float]] = {PLAIN: [], TLS: [], SIGNED: []}
    worked = dict.fromkeys(seconds, 0.0)
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="security-") as name, ExitStack() as stack:
        folder = Path(name)
        setups = {
            kind: stack.enter_context(setup(folder / f"setup-{i}", kind)) for i, kind in enumerate(seconds)
        }
        for number in range(warm + count):
            for kind, one in setups.items():
                values = generator.standard_normal(size // 4).astype(np.float32)
                taken, work = one.round(number, values)
                if number >= warm:
                    seconds[kind].append(taken)
                    worked[kind] += work
    plain = statistics.median(seconds[PLAIN])
    outcome = Outcome()
    for kind, found in seconds.items():
        outcome.rows.append(
            {
                "setup": kind,
                "clients": CLIENTS,
                "bytes": size,
                "rounds": len(found),
                "median_s": statistics.median(found),
                "min_s": min(found),
                "max_s": max(found),
                "plain_x": statistics.median(found) / plain,
                "cpu_s": worked[kind] / len(found),
                "cpu_x": worked[kind] / worked[PLAIN],
                "paired_x": statistics.median(b / a for a, b in zip(seconds[PLAIN], found, strict=True)),
            }
        )
    secured = statistics.median(seconds[SIGNED]) / plain
    outcome.targets = [Target.at_most("round with TLS and signatures over a plain one, ratio", secured, 1.1)]
    outcome.notes = [
        "paired_x is the median over rounds of the ratio to the plain round of the same turn",
        "cpu_s is the processor time of a round, server and clients together: it hangs less on what else runs",
    ]
    return outcome


@contextmanager
def setup(folder: Path, kind: str) -> Iterator[Setup]:
    """Run an edge's Fleet server and its clients, each a process."""
    folder.mkdir()
    pair = None if kind == PLAIN else certificate()
    roots = folder / "root.pem"
    more = ["--sign"] if kind == SIGNED else []
    if pair is not None:
        roots.write_bytes(pair[0])
        more += ["--root-certificates", str(roots)]
    server = InlineFleet("127.0.0.1:0", certificates=None if pair is None else (pair[0], *pair))
    server.start()
    processes = [psutil.Process()]
    try:
        with ExitStack() as stack:
            for number in range(CLIENTS):
                own = folder / f"client-{number}"
                own.mkdir()
                command = [sys.executable, "-m", "bench.signing_client", str(own / "state")]
                command += [f"127.0.0.1:{server.port}", *more]
                env = environment(own, PYTHONPATH=str(Path(__file__).parents[1]))
                process = stack.enter_context(running(command, own / "log", env))
                processes.append(psutil.Process(process.pid))
            wait_until(lambda: len(server.nodes()) == CLIENTS, 120, "the clients")
            grid = server.open_run()
            yield Setup(server, grid, kind == SIGNED, processes)
            grid.close()
    finally:
        server.stop(0.2)


def certificate() -> tuple[bytes, bytes]:
    """Return a self-signed certificate of 127.0.0.1 and its private key, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "bench")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = builder.add_extension(here, critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM), private


def _plan(number: int, client: str) -> pb.RoundPlan:
    tensors = [
        pb.TensorSpec(name=f"blocks.{i}.weight", dtype="float32", shape=[64, 64]) for i in range(TENSORS)
    ]
    return pb.RoundPlan(
        schema=control.SCHEMA,
        run="bench",
        window=1,
        round=number + 1,
        client=client,
        edge="edge",
        architecture=pb.ArchitectureSpec(family="unet", tensors=tensors),
        nonce=b"\1" * 16,
    )


if __name__ == "__main__":
    sys.exit(run("security", measure, ABOUT))
