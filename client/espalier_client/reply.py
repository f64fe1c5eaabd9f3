"""Builds a device's replies: the report, the payload, and the signature over both."""

from __future__ import annotations

from flwr.app import RecordDict

from espalier.wire import control
from espalier.wire.sections import Payload
from espalier.wire.signature import payload_digest, sign, statement_of
from espalier_client.device import Device
from espalier_proto import espalier_pb2 as pb


def new_report(device: Device, plan: pb.RoundPlan) -> pb.ClientReport:
    """Return the report of a reply to a plan, with the fields that every report has."""
    return pb.ClientReport(
        schema=control.SCHEMA,
        run=plan.run,
        window=plan.window,
        round=plan.round,
        client=device.name,
        samples=len(device.images),
    )


def pack_reply(device: Device, plan: pb.RoundPlan, report: pb.ClientReport, payload: Payload) -> RecordDict:
    """Return the content of a device's reply to a plan, signed with its node key if it has one.

    Parameters
    ----------
    device : Device
        This device.
    plan : pb.RoundPlan
        The plan that is replied to.
    report : pb.ClientReport
        The report; its field `signed` is set.
    payload : Payload
        The tensors.
    """
    payload = payload.frozen()
    if device.node_key is not None:
        statement = statement_of(plan, report, payload_digest(payload.to_records()))
        report.signed.CopyFrom(sign(statement, device.node_key))
    return control.report_content(report, payload, report.samples, report.loss)
