"""Packing a reply at a device: its report, its payload, its size and the signature over both."""

from __future__ import annotations

from flwr.app import RecordDict

from espalier.flower.arrays import payload_bytes
from espalier.flower.payloads import content_id
from espalier.wire import control
from espalier.wire.payload import Weights
from espalier.wire.signature import sign, statement_of
from espalier_client.device import Device
from espalier_proto import espalier_pb2 as pb


def pack_reply(device: Device, plan: pb.RoundPlan, report: pb.ClientReport, weights: Weights) -> RecordDict:
    """Return the content of a device's reply to a plan, signed with its node key where it has one.

    Parameters
    ----------
    device : Device
        This device.
    plan : pb.RoundPlan
        What is answered.
    report : pb.ClientReport
        The report; its `signed` and `up_bytes` are filled in.
    weights : Weights
        The payload.
    """
    record = weights.to_record()
    if device.node_key is not None:
        report.signed.CopyFrom(sign(statement_of(plan, report, content_id(record)), device.node_key))
    content = control.report_content(report, record, report.samples, report.loss)
    report.up_bytes = payload_bytes(content)
    return control.report_content(report, record, report.samples, report.loss)
