"""Validates and decodes the replies of clients into updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import Message

from espalier.errors import UNSOUND, WireError, unsound
from espalier.flower.arrays import payload_bytes
from espalier.methods.base import Method, Update
from espalier.methods.views import ClientView, answer_layouts, buffers_of
from espalier.training.privacy import PrivacySettings
from espalier.wire import control
from espalier.wire.codec import Codec
from espalier.wire.codec_registry import create_codec
from espalier.wire.sections import difference, layouts_from_proto
from espalier.wire.signature import UNSIGNED, check, payload_digest
from espalier.wire.uplink import UplinkEncoding
from espalier_edge.roster import Member
from espalier_proto import espalier_pb2 as pb


@dataclass(frozen=True)
class Answered:
    """A client's reply that passed validation."""

    report: pb.ClientReport
    update: Update


class ReplyReader:
    """Reads replies to the round plans of a run.

    Parameters
    ----------
    method : Method
        The run's method.
    """

    def __init__(self, method: Method) -> None:
        self._method = method
        name = method.chosen(method.settings, "codec")
        self._codec: Codec | None = None if name == "none" else create_codec(method.settings, name)

    def read(
        self,
        reply: Message,
        name: str,
        plans: Mapping[str, pb.RoundPlan],
        sent: Mapping[str, ClientView],
        called: Mapping[str, Member],
    ) -> Answered:
        """Validate and decode a reply.

        Parameters
        ----------
        reply : Message
            The reply.
        name : str
            The client whose node sent it.
        plans, sent, called : mapping
            The round plan, the view of the server's tensors and the roster's entry of each client that was called.

        Raises
        ------
        WireError
            The reply is an error, or does not match the client's plan, hello or signature; it names the client.
        """
        report = self._report(reply, plans, called, name)
        self._check_signature(reply, report, plans[name], called[name])
        return Answered(report, self._update(reply, report, plans[name], sent[name], called[name]))

    def _report(
        self,
        reply: Message,
        plans: Mapping[str, pb.RoundPlan],
        called: Mapping[str, Member],
        name: str,
    ) -> pb.ClientReport:
        """Return the report of a reply after checking it against the client's plan and hello."""
        report = control.read_control(pb.ClientReport, reply, name)
        if name not in plans or report.client != name:
            raise WireError(name, f"an update in the name of {report.client!r}")
        control.check_same_run(plans[name], report, name)
        if not 0 < report.samples <= called[name].hello.samples:
            raise WireError(name, f"{report.samples} samples, its hello had {called[name].hello.samples}")
        # Under differential privacy a client does not report its exact loss.
        withheld = (
            np.isnan(report.loss)
            and self._method.settings.of(PrivacySettings).private
            and not plans[name].inquiry
        )
        losses = [] if withheld else [report.loss]
        if not np.isfinite([*losses, *report.metrics.values()]).all():
            raise WireError(name, "a loss or another metric that is not finite")
        report.up_bytes = payload_bytes(reply.content)
        return report

    def _check_signature(
        self, reply: Message, report: pb.ClientReport, plan: pb.RoundPlan, member: Member
    ) -> None:
        """Check that the client signed exactly this reply to exactly this plan."""
        if not report.HasField("signed"):
            if self._method.settings.require_signatures:
                raise WireError(report.client, UNSIGNED)
            return
        digest = payload_digest(control.array_records(reply.content))
        check(plan, report, digest, member.hello.public_key)

    def _update(
        self, reply: Message, report: pb.ClientReport, plan: pb.RoundPlan, sent: ClientView, member: Member
    ) -> Update:
        """Validate and decode the tensors of a reply, and assign them to the server's sections."""
        name, received = report.client, sent.payload.views()
        metrics = {**report.metrics, "loss": report.loss, "steps": report.steps}
        try:
            returned = (
                answer_layouts(
                    plan.inquiry,
                    sent.architecture,
                    self._method.settings,
                    plan.population,
                    metrics,
                    tuple(member.hello.image_shape),
                )
                if plan.inquiry
                else self._method.reply_layouts(sent.architecture, sent.payload.layouts, sent.returns, report)
            )
        except UNSOUND as error:
            raise WireError(name, unsound(error)) from error
        encoding = UplinkEncoding(
            returned,
            sent.payload.layouts,
            buffers_of(sent.architecture),
            None if plan.inquiry else self._codec,
        )
        claimed = layouts_from_proto(report.sections, name) if report.sections else encoding.wire
        if fault := difference(encoding.wire, claimed):
            raise WireError(name, fault)
        arrays = encoding.decode(control.read_payload(reply, encoding.wire, name), received, name)
        own = {section: tensors for section, tensors in arrays.items() if section in received}
        return Update(
            name=name,
            sections=sent.at_server(own),
            received=sent.at_server({s: {n: received[s][n] for n in own[s]} for s in own}),
            samples=report.samples,
            labels=member.labels,
            metrics=metrics,
            extra={section: tensors for section, tensors in arrays.items() if section not in received},
            report=report,
        )
