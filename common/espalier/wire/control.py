"""Control messages: packing of protobufs into Flower messages, and reading them back."""

from __future__ import annotations

from functools import lru_cache
from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Proto

from espalier import distribution
from espalier.errors import WireError
from espalier.wire.payload import Layout
from espalier.wire.sections import MODEL, Layouts, Payload, SectionId, layouts_from_proto
from espalier_proto import espalier_pb2 as pb

#: Version of proto/espalier_proto/espalier.proto; incremented when the meaning of a message changes.
SCHEMA = 2

#: Message types. A plan is sent in Flower's own "train", so that any Flower strategy can send one; the prefix of the
#: other actions avoids collisions with those of a user's app.
TRAIN = "train"
HELLO = "query.espalier_hello"
INQUIRY = "query.espalier_inquiry"
REFUSAL = "query.espalier_refusal"
PROGRESS = "query.espalier_progress"
DONE = "query.espalier_done"

#: Record keys: Flower's defaults for arrays, config and metrics, and Espalier's for the report.
ARRAYS, CONFIG, METRICS, REPORT = "arrays", "config", "metrics", "espalier"
#: Key of the plan in the config record, and of the report in the report record.
PLAN = "espalier"
#: Flower's key of the weight of a reply.
NUM_EXAMPLES = "num-examples"

P = TypeVar("P", bound=Proto)


def decode(kind: type[P], data: object, sender: str) -> P:
    """Parse a control message and check its schema version.

    Parameters
    ----------
    kind : type
        The expected protobuf class; it has a field `schema`.
    data : object
        The value in the record; bytes if the message is valid.
    sender : str
        Name of the sender, for error messages.

    Raises
    ------
    WireError
        If `data` is not bytes, is truncated, is not of that class, or is of another schema version.
    """
    if not isinstance(data, bytes):
        raise WireError(sender, f"no {kind.__name__} in the message")
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise WireError(sender, f"a {kind.__name__} that is truncated or not a protobuf") from error
    schema: int = getattr(message, "schema", 0)
    if schema != SCHEMA:
        raise WireError(
            sender,
            f"a {kind.__name__} of schema {schema}{_version_of(message)}, this side uses {SCHEMA} (espalier "
            f"{distribution.version()}); install the same version of espalier-fl on both",
        )
    return message


def _version_of(message: Proto) -> str:
    """Return the Espalier version in a hello of another schema, if it can be read; else ""."""
    facts = getattr(message, "facts", None)
    version = facts.versions.get("espalier", "") if facts is not None else ""
    return f" (espalier {version[:32]})" if version else ""


def plan_bytes(message: Message) -> bytes | None:
    """Return the serialized plan of a message, or None for a plain Flower message."""
    record = config_of(message, CONFIG)
    data = record.get(PLAN) if record is not None else None
    return data if isinstance(data, bytes) else None


def config_of(message: Message, key: str) -> ConfigRecord | None:
    """Return a config record of a message, or None if there is none of that key.

    It does not use `content.config_records`, which creates a reference cycle: the payload would stay in memory until
    the next garbage collection.
    """
    record = message.content.get(key) if message.has_content() else None
    return record if isinstance(record, ConfigRecord) else None


def plan_content(plan: Proto, payload: Payload) -> RecordDict:
    """Return the content of a message with a plan and its payload."""
    return RecordDict({**payload.to_records(), CONFIG: ConfigRecord({PLAN: plan.SerializeToString()})})


def report_content(report: Proto, payload: Payload, samples: int, loss: float) -> RecordDict:
    """Return the content of a reply with a report, its payload and the MetricRecord that Flower strategies expect."""
    return RecordDict(
        {
            **payload.to_records(),
            METRICS: MetricRecord({NUM_EXAMPLES: samples, "loss": loss}),
            REPORT: ConfigRecord({PLAN: report.SerializeToString()}),
        }
    )


def control_content(message: Proto) -> RecordDict:
    """Return the content of a control message without a payload (a hello, an edge's progress)."""
    return RecordDict({REPORT: ConfigRecord({PLAN: message.SerializeToString()})})


def read_control(kind: type[P], message: Message, sender: str) -> P:
    """Read the report or hello of a reply; see :func:`decode`.

    Raises
    ------
    WireError
        If the reply is an error, or :func:`decode` rejects its control message.
    """
    if message.has_error():
        raise WireError(sender, f"an error instead of a {kind.__name__}: {message.error.reason}")
    record = config_of(message, REPORT)
    return decode(kind, record.get(PLAN) if record is not None else None, sender)


def array_records(content: RecordDict) -> dict[str, ArrayRecord]:
    """Return the ArrayRecords of a message by key, without `content.array_records`: see :func:`config_of`."""
    return {key: record for key, record in content.items() if isinstance(record, ArrayRecord)}


def read_payload(message: Message, layouts: Layouts, sender: str) -> Payload:
    """Read the payload of a message and check it against the expected sections; see `Payload.read`."""
    return Payload.read(array_records(message.content), layouts, sender)


def plan_sections(plan: pb.WindowPlan | pb.RoundPlan, sender: str) -> dict[SectionId, Layout]:
    """Return the sections of a plan's payload: those that it lists, or else the architecture's tensors."""
    if plan.sections:
        data = pb.View(sections=plan.sections).SerializeToString(deterministic=True)
    else:
        spec = pb.ArchitectureSpec(tensors=plan.architecture.tensors)
        data = pb.View(architecture=spec).SerializeToString(deterministic=True)
    return dict(_sections(data, sender))


@lru_cache(maxsize=16)
def _sections(data: bytes, sender: str) -> dict[SectionId, Layout]:
    """Read the sections of a plan; cached, because consecutive rounds usually have the same ones."""
    view = pb.View.FromString(data)
    layouts = (
        layouts_from_proto(view.sections, sender)
        if view.sections
        else {MODEL: Layout.from_proto(view.architecture.tensors, sender)}
    )
    # A plan without a payload lists an empty section, because a plan that lists no section sends the network.
    return {section: layout for section, layout in layouts.items() if layout.tensors}


def check_same_run(
    plan: pb.WindowPlan | pb.RoundPlan, report: pb.ClientReport | pb.EdgeReport, sender: str
) -> None:
    """Check that a reply is to this run, window and round.

    Raises
    ------
    WireError
        If the reply is to another run, window or round.
    """
    if report.run != plan.run or report.window != plan.window:
        raise WireError(
            sender,
            f"a reply to run {report.run!r} window {report.window}, "
            f"this is run {plan.run!r} window {plan.window}",
        )
    if isinstance(plan, pb.RoundPlan) and isinstance(report, pb.ClientReport) and report.round != plan.round:
        raise WireError(sender, f"a reply to round {report.round}, this is round {plan.round}")
