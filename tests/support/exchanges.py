"""What tests of knowledge exchange share: what clients start a round from, and what edges tell the cloud."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from bench.local_tree import LocalTree
from flwr.app import Message
from torch import Tensor

from espalier.data.spec import open_data
from espalier.flower.arrays import numpy_view, payload_bytes
from espalier.methods.run_config import RunConfig
from espalier.models.arrays import load_arrays
from espalier.models.initial import initial_model
from espalier.models.layers import Classifier
from espalier.wire import control
from espalier.wire.class_table import REPLY, VECTORS
from espalier.wire.sections import layouts_from_proto
from espalier_client.device import Device
from espalier_proto import espalier_pb2 as pb
from tests.support.by_hand import Arrays, Call, Nested, copied

#: A client's whole state by its name and the round it is the state after.
Starts = dict[tuple[str, int], Arrays]


def listen_to_starts(monkeypatch: pytest.MonkeyPatch) -> Starts:
    """Note what devices read of their own state; a run removes old versions."""
    found: Starts = {}
    load = Device.load_state

    def load_state(
        self: Device, run: str, start: pb.Version, *, exact: bool = False
    ) -> dict[str, np.ndarray]:
        state = load(self, run, start, exact=exact)
        found[self.name, start.round] = {n: a.copy() for n, a in state.items()}
        return state

    monkeypatch.setattr(Device, "load_state", load_state)
    return found


def own_model(call: Call, state: Arrays) -> Classifier:
    """Return a client's network as it stood when a call came."""
    return network(call.plan, {n.removeprefix("own/"): a for n, a in state.items() if n.startswith("own/")})


def network(plan: pb.RoundPlan, arrays: Arrays) -> Classifier:
    name = plan.architecture.config["model"]
    settings = RunConfig.from_struct(plan.settings).model_copy(update={"model": name})
    model = initial_model(settings, (1, 8, 8), 10)
    load_arrays(model, arrays)
    assert isinstance(model, Classifier)
    return model


def images_of(spec: str) -> tuple[Tensor, Tensor]:
    """Return all images of a data SPEC and their labels."""
    data = open_data(spec)
    return data.fetch(np.arange(len(data))), torch.from_numpy(np.array(data.labels))


def training(calls: Iterable[Call], round_: int) -> dict[str, Call]:
    """Return the training calls of a round by client."""
    return {c.plan.client: c for c in calls if c.trains and c.plan.round == round_}


def rows(call: Call) -> dict[int, np.ndarray]:
    """Return the vectors a client sent, by class."""
    return dict(zip(call.report.table.labels, call.sections[REPLY][VECTORS], strict=True))


@dataclass
class Told:
    """What an edge told the cloud after a window."""

    report: pb.EdgeReport
    payload: Nested
    payload_bytes: int
    raw: bytes


def edges_tell(tree: LocalTree) -> list[Told]:
    """Listen to all edges of a tree; the list grows while it runs."""
    told: list[Told] = []
    for node in tree.nodes:
        node.app = _listening(node.app, told)
    return told


def _listening(app: Any, told: list[Told]) -> Any:
    def answer(message: Message, context: Any) -> Message:
        reply: Message = app(message, context)
        if message.metadata.message_type == control.TRAIN:
            report = control.read_control(pb.EdgeReport, reply, "edge")
            layouts = layouts_from_proto(report.sections, "edge")
            payload = control.read_payload(reply, layouts, "edge").views()
            raw = b"".join(
                array.data
                for record in control.array_records(reply.content).values()
                for array in record.values()
            )
            raw += b"".join(section.SerializeToString() for section in report.sections)
            told.append(Told(report, copied(payload), payload_bytes(reply.content), raw))
        return reply

    return answer


def value_bytes(message: Message) -> int:
    """Return the bytes of the values in a message's arrays, their headers not counted."""
    records = control.array_records(message.content).values()
    return sum(numpy_view(array).nbytes for record in records for array in record.values())
