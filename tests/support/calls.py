"""A device that is called as its edge calls it: a plan and a payload in, a report and tensors out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import nn

from espalier.methods.registry import create_method
from espalier.methods.run_config import RunConfig
from espalier.models.architecture import describe
from espalier.models.arrays import model_arrays
from espalier.wire import control
from espalier.wire.payload import Layout, Weights
from espalier.wire.sections import MODEL, Layouts, Payload, SectionId, layouts_to_proto
from espalier_client.device import Device
from espalier_proto import espalier_pb2 as pb

TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


@dataclass
class Call:
    """What one call is made of.

    Attributes
    ----------
    device : Device
        Who is called.
    model : nn.Module
        The network that is sent.
    settings : RunConfig
        The run's.
    sections : dict of SectionId to dict of str to numpy.ndarray
        What is sent besides the network.
    """

    device: Device
    model: nn.Module
    settings: RunConfig
    sections: dict[SectionId, dict[str, np.ndarray]] = field(default_factory=dict)

    @property
    def sent(self) -> Payload:
        return Payload.pack({MODEL: model_arrays(self.model), **self.sections})

    def plan(self, **changes: Any) -> pb.RoundPlan:
        plan = pb.RoundPlan(
            schema=control.SCHEMA,
            run="r",
            window=1,
            round=3,
            client=self.device.name,
            edge="edge-1",
            settings=self.settings.to_struct(),
            architecture=describe(self.model),
            sections=layouts_to_proto(self.sent.layouts),
            population=4,
        )
        for key, value in changes.items():
            setattr(plan, key, value)
        return plan

    def message(self, plan: pb.RoundPlan, kind: str) -> Message:
        return Message(control.plan_content(plan, self.sent), 1, kind)


def call(device: Device, **flat: Any) -> Call:
    """Return a call with the network that a run of these settings starts from."""
    settings = RunConfig.from_flat({k.replace("_", "-"): v for k, v in flat.items()})
    model = create_method(settings).initial(device.images.shape, len(device.images.classes))
    return Call(device, model, settings)


def device(name: str = "c", data: str = "digits:0/32", state: Path | None = None) -> Device:
    return Device(name, data, device="cpu", state=state)


def report_of(content: RecordDict) -> pb.ClientReport:
    record = content.config_records[control.REPORT]
    return control.decode(pb.ClientReport, record[control.PLAN], "c")


def weights_of(content: RecordDict, layout: Layout) -> Weights:
    return payload_of(content, {MODEL: layout})[MODEL]


def payload_of(content: RecordDict, layouts: Layouts) -> Payload:
    return Payload.read(control.array_records(content), layouts, "c")
