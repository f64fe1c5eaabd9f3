"""What the tests of whole methods share: tensors by formula, servers, replies, and what clients keep on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.local_tree import LocalClient, LocalTree
from flwr.app import Message
from torch.nn import functional

from espalier.data.spec import open_data
from espalier.flower.arrays import payload_bytes
from espalier.flower.node_state import load_key
from espalier.methods.aggregate import Aggregate
from espalier.methods.base import CloudState, Method, Update
from espalier.methods.registry import create_method
from espalier.methods.run_config import RunConfig
from espalier.methods.state import build_model
from espalier.methods.views import answer_layouts
from espalier.wire import control
from espalier.wire.payload import Weights
from espalier.wire.sections import MODEL, Payload, SectionId, Sections, layouts_to_proto
from espalier.wire.signature import payload_digest, sign, statement_of
from espalier_client.state import StateStore
from espalier_client.training import uplink_encoding
from espalier_proto import espalier_pb2 as pb
from espalier_server.run import TreeRun

Arrays = dict[str, np.ndarray]
#: Arrays by section.
Nested = dict[SectionId, Arrays]

#: The same clients below one, two and three edges.
EDGES = pytest.mark.parametrize("edges", [1, 2, 3])


def wave(seed: int, *shape: int) -> np.ndarray:
    """Return float32 numbers that anybody can compute again: sin(0.37 (i + 1)(seed + 1))."""
    count = math.prod(shape)
    numbers: np.ndarray = np.sin(0.37 * (np.arange(count) + 1) * (seed + 1)).astype(np.float32)
    return numbers.reshape(shape)


def method(name: str, **settings: Any) -> Method:
    return create_method(RunConfig(method=name, **settings))


def server(arrays: Mapping[str, np.ndarray], buffers: Sequence[str] = (), population: int = 1) -> CloudState:
    """Return a server of a network that consists of the given tensors."""
    spec = pb.ArchitectureSpec(family="none")
    for name, array in arrays.items():
        spec.tensors.add(name=name, dtype=str(array.dtype), shape=array.shape, buffer=name in buffers)
    return CloudState(spec, Payload.pack({MODEL: arrays}), population)


def reply(
    state: CloudState,
    name: str,
    arrays: Mapping[str, np.ndarray],
    samples: int = 1,
    labels: Sequence[int] = (1,),
    **metrics: float,
) -> Update:
    """Return a client's reply; it had been sent the same leading slices of the server's tensors."""
    return reply_of(state, name, {MODEL: arrays}, samples, labels, **metrics)


def reply_of(
    state: CloudState,
    name: str,
    sections: Sections,
    samples: int = 1,
    labels: Sequence[int] = (1,),
    **metrics: float,
) -> Update:
    """Return a client's reply of several sections; see `reply`."""
    sent = {
        s: {n: state.section(s)[n][tuple(slice(0, d) for d in a.shape)] for n, a in arrays.items()}
        for s, arrays in sections.items()
    }
    named = {key.replace("_", "-"): value for key, value in metrics.items()}
    trained = {s: dict(arrays) for s, arrays in sections.items()}
    return Update(name, trained, sent, samples, np.array(labels), named)


def aggregate(rule: Method, state: CloudState, replies: Sequence[Update], edges: int = 1) -> None:
    """Take a method's step as edges and cloud do: each edge adds up its replies, the cloud merges."""
    merged = Aggregate(state.payload.layouts)
    for edge in range(edges):
        part = Aggregate(state.payload.layouts)
        for update in replies[edge::edges]:
            rule.add(part, update, state)
        merged.absorb(*part.report())
    state.round += 1
    rule.central_step(state, merged)
    state.window += 1


def same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], atol: float = 1e-6) -> None:
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=atol, err_msg=name)


def kept(folder: Path, client: str, run: str = "r") -> Arrays:
    """Return what a client of a local tree keeps of a run; nothing if it never took part."""
    return StateStore(folder / "clients" / client / "rounds").load(run, (10**6, 10**6))


def mean_kept(folder: Path, clients: Sequence[str], prefix: str, like: Mapping[str, np.ndarray]) -> Arrays:
    """Return the mean over all clients of what they keep under a prefix; who never took part counts as 0."""
    total = {name: np.zeros(array.shape) for name, array in like.items()}
    for client in clients:
        for name, array in kept(folder, client).items():
            if name.startswith(prefix):
                total[name.removeprefix(prefix)] += array
    return {name: array / len(clients) for name, array in total.items()}


# --- networks ----------------------------------------------------------------------------------------


def corner(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the leading block of a shape."""
    return array[tuple(slice(0, n) for n in shape)]


def loaded(architecture: pb.ArchitectureSpec, arrays: Arrays) -> Any:
    """Return the network of an architecture with given tensors, in evaluation mode."""
    own = {t.name: np.array(arrays[t.name]) for t in architecture.tensors}
    return build_model(architecture, Weights.pack(own)).eval()


def network_loss(architecture: pb.ArchitectureSpec, arrays: Arrays, data: str) -> torch.Tensor:
    """Return the mean cross-entropy over all of a client's images in evaluation mode, in plain torch."""
    return _cross_entropy(loaded(architecture, arrays), data)


def gradient(architecture: pb.ArchitectureSpec, arrays: Arrays, data: str) -> Arrays:
    """Return the gradient of :func:`network_loss`, float64 by parameter."""
    model = loaded(architecture, arrays)
    _cross_entropy(model, data).backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.numpy().astype(np.float64) for n, p in model.named_parameters()}


def _cross_entropy(model: Any, data: str) -> torch.Tensor:
    images = open_data(data)
    logits = model(images.fetch(np.arange(len(images))))
    return functional.cross_entropy(logits, torch.from_numpy(np.asarray(images.labels)))


def trained(run: TreeRun) -> Arrays:
    """Return the global network's tensors after a run."""
    assert run.state is not None
    return {t.name: run.state.tensors[t.name] for t in run.state.architecture.tensors}


# --- whole trees -------------------------------------------------------------------------------------


@dataclass
class Call:
    """A message to a client of a local tree, and what it answered.

    `up_bytes` are measured as the edge measures them, which enters them into the report that it receives.
    """

    plan: pb.RoundPlan
    sent_sections: Nested
    report: pb.ClientReport
    sections: Nested
    raw: bytes
    up_bytes: int

    @property
    def sent(self) -> Arrays:
        """The network's tensors that it was sent."""
        return self.sent_sections.get(MODEL, {})

    @property
    def payload(self) -> Arrays:
        """The network's tensors that it answered with."""
        return self.sections.get(MODEL, {})

    @property
    def trains(self) -> bool:
        return not self.plan.inquiry


#: Changes a client's reply before it leaves: what it was sent, its tensors, its report (in place).
Change = Callable[[Nested, Nested, pb.ClientReport], Nested]


def on_model(change: Callable[[Arrays, Arrays, pb.ClientReport], Arrays]) -> Change:
    """Return a change of the network's tensors alone."""

    def changed(sent: Nested, sections: Nested, report: pb.ClientReport) -> Nested:
        return {**sections, MODEL: change(sent[MODEL], sections[MODEL], report)}

    return changed


def tapped(tree: LocalTree, change: Change | None = None) -> list[Call]:
    """Listen to all clients of a tree; the list grows while it runs."""
    calls: list[Call] = []
    for node in (node for below in tree.edges for node in below):
        node.app = _tap(node.app, calls, change)
    return calls


def in_round(calls: Sequence[Call], round_: int, trains: bool) -> list[Call]:
    """Return the calls of one round: those that train, or the inquiries."""
    return [c for c in calls if c.plan.round == round_ and c.trains == trains]


def sample_mean(calls: Sequence[Call], name: str) -> np.ndarray:
    """Return the n_k-weighted mean of a tensor over the clients that sent it, in float64."""
    holders = [c for c in calls if name in c.payload]
    total = sum(c.report.samples for c in holders)
    mean: np.ndarray = np.sum(
        [c.report.samples / total * c.payload[name].astype(np.float64) for c in holders], axis=0
    )
    return mean


def _tap(app: Callable[[Message, Any], Message], calls: list[Call], change: Change | None) -> Any:
    def answer(message: Message, context: Any) -> Message:
        reply = app(message, context)
        data = control.plan_bytes(message)
        if message.metadata.message_type not in (control.TRAIN, control.INQUIRY) or data is None:
            return reply
        plan = control.decode(pb.RoundPlan, data, "edge")
        received = control.plan_sections(plan, "edge")
        sent = control.read_payload(message, received, "edge").views()
        report = control.read_control(pb.ClientReport, reply, plan.client)
        method_ = create_method(RunConfig.from_struct(plan.settings))
        if plan.inquiry:
            layouts = answer_layouts(
                plan.inquiry,
                plan.architecture,
                method_.settings,
                plan.population,
                dict(report.metrics),
                (1, 8, 8),
            )
        else:
            layouts = uplink_encoding(method_, plan, received, report).wire
        payload = control.read_payload(reply, layouts, plan.client).views()
        if change is not None and not plan.inquiry:
            payload = change(sent, payload, report)
            changed = Payload.pack(payload).frozen()
            report.sections.extend(layouts_to_proto(changed.layouts))
            digest, key = payload_digest(changed.to_records()), load_key(Path(context.node_config["key"]))
            report.signed.CopyFrom(sign(statement_of(plan, report, digest), key))
            content = control.report_content(report, changed, report.samples, report.loss)
            reply = Message(content, reply_to=message)
        calls.append(
            Call(
                plan,
                copied(sent),
                report,
                copied(payload),
                raw_bytes(reply),
                payload_bytes(reply.content),
            )
        )
        return reply

    return answer


def copied(sections: Sections) -> Nested:
    """Return copies of the arrays."""
    return {section: {n: a.copy() for n, a in arrays.items()} for section, arrays in sections.items()}


def raw_bytes(message: Message) -> bytes:
    """Return everything a message carries, one after another."""
    parts = [array.data for record in message.content.array_records.values() for array in record.values()]
    configs = [repr(dict(record)).encode() for record in message.content.config_records.values()]
    return b"".join([*parts, *configs])


def small_tree(folder: Path, clients: int = 4, of: int = 30, edges: int = 2, **more: Any) -> LocalTree:
    """Return a tree whose clients c0, c1, … hold 1/of of the digits each; all reach all edges."""
    spec = more.pop("data", "digits:{i}/{of}")
    reach = more.pop("reach", lambda i: tuple(range(edges)))
    return LocalTree(
        folder, [LocalClient(f"c{i}", spec.format(i=i, of=of), reach(i)) for i in range(clients)], edges
    )


def run_tree(tree: LocalTree, name: str, clients: int, **settings: Any) -> TreeRun:
    """Run it with few and fast rounds; the run must finish."""
    own = {key.replace("_", "-"): value for key, value in settings.items()}
    whole: dict[str, bool | int | float | str] = {"method": name, "model": "mlp", "rg": 1}
    whole |= {"min-edges": len(tree.edges), "min-clients": clients}
    run = tree.run("r", whole | own)
    assert run.state is not None
    assert run.recorder.record.status == "finished"
    return run
