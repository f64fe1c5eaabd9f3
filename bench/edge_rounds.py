"""Rounds between an edge's Fleet server and client processes, with or without training, for several benches."""

from __future__ import annotations

import datetime
import ipaddress
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import Message
from google.protobuf.struct_pb2 import Struct

from bench.stock import environment, running, wait_until
from espalier.wire import control
from espalier.wire.payload import Layout, TensorSpec, Weights
from espalier.wire.sections import Payload
from espalier.wire.signature import check, payload_digest
from espalier_edge.fleet.server import InlineFleet, InlineGrid
from espalier_proto import espalier_pb2 as pb

DEADLINE = 300.0
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Round:
    """Cost of a round.

    Attributes
    ----------
    seconds : float
        Wall time, from the tensors at the edge to the last reply, checked, as tensors.
    server, clients : float
        Processor seconds of the edge process, and of all client processes together.
    """

    seconds: float
    server: float
    clients: float


@dataclass
class Setup:
    """An edge's Fleet server in this process, and its clients.

    Attributes
    ----------
    server, grid : InlineFleet, InlineGrid
        The edge's own.
    signs : bool
        Whether the clients sign their replies; then the signatures are checked.
    processes : list of psutil.Process
        The clients'.
    trained : Trained, optional
        The network that clients train; without it they return changed values without training.
    """

    server: InlineFleet
    grid: InlineGrid
    signs: bool
    processes: list[psutil.Process]
    trained: Trained | None = None

    def round(self, number: int, weights: Weights) -> Round:
        """Run a round as an edge does, without the aggregation."""
        nodes = {node.node_id: node.public_key for node in self.server.nodes()}
        server, clients = cpu_seconds([psutil.Process()]), cpu_seconds(self.processes)
        began = time.perf_counter()
        payload = Payload.of(weights).frozen()
        plans = {node: self._plan(number, node, weights.layout) for node in nodes}
        messages = [
            Message(control.plan_content(plan, payload), node, control.TRAIN) for node, plan in plans.items()
        ]
        answered = 0
        for reply in self.grid.exchange(messages, deadline=DEADLINE):
            node = reply.metadata.src_node_id
            report = control.read_control(pb.ClientReport, reply, plans[node].client)
            if self.signs:
                digest = payload_digest(control.array_records(reply.content))
                check(plans[node], report, digest, nodes[node])
            control.read_payload(reply, payload.layouts, plans[node].client).views()
            if self.trained is not None and not report.steps:
                raise RuntimeError(f"{plans[node].client} did not train")
            answered += 1
        seconds = time.perf_counter() - began
        if answered != len(nodes):
            raise RuntimeError(f"{answered} of {len(nodes)} clients answered")
        return Round(seconds, cpu_seconds([psutil.Process()]) - server, cpu_seconds(self.processes) - clients)

    def _plan(self, number: int, node: int, layout: Layout) -> pb.RoundPlan:
        plan = plan_of(number, f"client-{node}", layout)
        if self.trained is not None:
            plan.settings.CopyFrom(self.trained.settings)
            plan.architecture.CopyFrom(self.trained.architecture)
        return plan


@dataclass(frozen=True)
class Trained:
    """A network that clients train in a round: run settings, architecture and weights."""

    settings: Struct
    architecture: pb.ArchitectureSpec
    weights: Weights


@contextmanager
def setup(
    folder: Path, clients: int, *, tls: bool = False, signs: bool = False, trained: Trained | None = None
) -> Iterator[Setup]:
    """Run an edge's Fleet server and its clients, each a process."""
    folder.mkdir(parents=True)
    pair = certificate() if tls else None
    roots = folder / "root.pem"
    options = (["--sign"] if signs else []) + (["--train"] if trained else [])
    if pair is not None:
        roots.write_bytes(pair[0])
        options += ["--root-certificates", str(roots)]
    server = InlineFleet("127.0.0.1:0", certificates=None if pair is None else (pair[0], *pair))
    server.start()
    try:
        with ExitStack() as stack:
            processes = []
            for number in range(clients):
                process = stack.enter_context(
                    client(folder / f"client-{number}", f"127.0.0.1:{server.port}", *options)
                )
                processes.append(process)
            wait_until(lambda: len(server.nodes()) == clients, 120, "the clients")
            grid = server.open_run()
            yield Setup(server, grid, signs, processes, trained)
            grid.close()
    finally:
        server.stop(0.2)


@contextmanager
def client(folder: Path, address: str, *options: str) -> Iterator[psutil.Process]:
    """Run one client process; `options` are those of `bench.signing_client`, e.g. ``--train``."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "bench.signing_client", str(folder / "state"), address, *options]
    with running(command, folder / "log", environment(folder, PYTHONPATH=str(ROOT))) as process:
        yield psutil.Process(process.pid)


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """Return the total processor seconds of processes since their start."""
    return sum(times.user + times.system for times in (p.cpu_times() for p in processes))


def certificate() -> tuple[bytes, bytes]:
    """Return a self-signed certificate for 127.0.0.1 and its private key, both in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "bench")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    loopback = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = builder.add_extension(loopback, critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM), private


def plan_of(number: int, client: str, layout: Layout) -> pb.RoundPlan:
    """Return the plan of a round; the layout stands in its architecture, which a client's signature covers."""
    architecture = pb.ArchitectureSpec(family="unet", tensors=layout.to_proto().tensors)
    return pb.RoundPlan(
        schema=control.SCHEMA,
        run="bench",
        window=1,
        round=number + 1,
        client=client,
        edge="edge",
        architecture=architecture,
        nonce=b"\1" * 16,
    )


# --- payloads ------------------------------------------------------------------------------------------


def one_tensor(size: int, dtype: str = "float32") -> Layout:
    """Return the layout of a single tensor of `size` bytes."""
    return Layout((TensorSpec("flat", dtype, (size // np.dtype(dtype).itemsize,)),))


def unet_layout(size: int | None = None, dtype: str = "float32") -> Layout:
    """Return the layout of FedPhD's U-Net for CIFAR-10, at full size or scaled down.

    Parameters
    ----------
    size : int, optional
        Total bytes; every tensor keeps its share, as a flat tensor. By default full size (143 MB in float32).
    dtype : str
        Dtype of all tensors.
    """
    import torch

    from espalier.models.unet import unet

    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in unet("unet-paper", 3, 32).state_dict().items()}
    whole = Layout(tuple(TensorSpec(name, dtype, shape) for name, shape in shapes.items()))
    if size is None:
        return whole
    share = size / whole.nbytes
    return Layout(tuple(TensorSpec(t.name, dtype, (max(1, round(t.size * share)),)) for t in whole.tensors))


def trained_network(model: str, **flat: Any) -> Trained:
    """Return a network of a preset for the digits, and the settings to train it with."""
    from espalier.methods.registry import create_method
    from espalier.methods.run_config import RunConfig
    from espalier.models.architecture import describe
    from espalier.models.arrays import model_arrays

    settings = RunConfig.from_flat({"method": "fedavg", "model": model, **flat})
    network = create_method(settings).initial((1, 8, 8), 10)
    return Trained(settings.to_struct(), describe(network), Weights.pack(model_arrays(network)))


def random_weights(layout: Layout, seed: int) -> Weights:
    """Return random weights that depend on the seed, for a layout with one floating-point dtype."""
    [(dtype, length)] = layout.lengths.items()
    values = np.random.default_rng(seed).random(length, np.float32)
    return Weights(layout, {dtype: values.astype(dtype, copy=False)})
