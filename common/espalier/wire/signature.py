"""Signed updates: a client's statement about its reply, so that no server in between can forge one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from flwr.app import ArrayRecord
from google.protobuf.message import Message as Proto

from espalier.errors import WireError
from espalier.flower.payloads import content_id
from espalier.wire import control
from espalier_proto import espalier_pb2 as pb

#: Prefix of what is signed: Flower signs other things with the same key, which must not pass for a statement.
DOMAIN = b"espalier.v1.UpdateStatement\0"

#: Fields of a ClientReport that say how to read the payload; only the edge gets them.
FORM = ("sections", "table", "architecture")

#: Why an update without a signature is refused.
UNSIGNED = (
    "an update without a signature; run our client, or name a SuperNode's key file in its node config "
    '(key="…"), or set require-signatures=false'
)

_MISMATCH = {
    "architecture": "another architecture than the one that was sent",
    "payload": "another payload than the one that came",
    "form": "another layout of the payload than the one that came",
    "report": "another report than the one that came",
    "nonce": "another plan than this one",
}


def digest(message: Proto) -> bytes:
    """Return the SHA-256 of a protobuf: fields in the order of their numbers, map entries in that of their keys."""
    return hashlib.sha256(message.SerializeToString(deterministic=True)).digest()


def payload_digest(records: Mapping[str, ArrayRecord]) -> bytes:
    """Return the SHA-256 of a payload: of the keys of its ArrayRecords and of what names their contents."""
    whole = hashlib.sha256()
    for key, record in sorted(records.items()):
        name = key.encode()
        whole.update(len(name).to_bytes(4, "big") + name + content_id(record))
    return whole.digest()


def statement_of(plan: pb.RoundPlan, report: pb.ClientReport, payload: bytes) -> pb.UpdateStatement:
    """Return the statement that belongs to a reply: the client signs it, and its edge expects it.

    Parameters
    ----------
    plan : pb.RoundPlan
        What the reply answers.
    report : pb.ClientReport
        The reply's report; its `up_bytes` are not covered: the edge measures them.
    payload : bytes
        Digest of the reply's payload, see `payload_digest`.
    """
    said, form = pb.ClientReport(), pb.ClientReport()
    said.CopyFrom(report)
    form.sections.extend(said.sections)
    for name in ("table", "architecture"):
        if said.HasField(name):
            getattr(form, name).CopyFrom(getattr(said, name))
    for name in FORM:
        said.ClearField(name)
    said.ClearField("signed")
    said.ClearField("up_bytes")
    return pb.UpdateStatement(
        schema=control.SCHEMA,
        run=plan.run,
        window=plan.window,
        round=plan.round,
        client=plan.client,
        edge=plan.edge,
        inquiry=plan.inquiry,
        nonce=plan.nonce,
        samples=report.samples,
        architecture=digest(plan.architecture),
        payload=payload,
        form=digest(form),
        report=digest(said),
    )


def sign(statement: pb.UpdateStatement, key: ec.EllipticCurvePrivateKey) -> pb.SignedStatement:
    """Sign a statement with a node key."""
    content = statement.SerializeToString()
    size = _half(key.curve)
    # Both numbers at full length: in DER the size of a reply would vary at random.
    numbers = decode_dss_signature(key.sign(DOMAIN + content, ec.ECDSA(SHA256())))
    return pb.SignedStatement(
        statement=content, signature=b"".join(number.to_bytes(size, "big") for number in numbers)
    )


def verify(signed: pb.SignedStatement, public_key: bytes, signer: str) -> pb.UpdateStatement:
    """Check a signature and return what was signed.

    Parameters
    ----------
    signed : pb.SignedStatement
        What came.
    public_key : bytes
        PEM of the key that the receiver knows the signer by.
    signer : str
        Whom an error names.

    Raises
    ------
    WireError
        If the key did not make the signature, or it is none of a statement.
    """
    key = _load(public_key)
    if key is None:
        raise WireError(signer, "a signature, and its node key is none that could have made it")
    size, signature = _half(key.curve), signed.signature
    if len(signature) != 2 * size:
        raise WireError(signer, f"a signature of {len(signature)} bytes, its key makes {2 * size}")
    numbers = (int.from_bytes(half, "big") for half in (signature[:size], signature[size:]))
    try:
        key.verify(encode_dss_signature(*numbers), DOMAIN + signed.statement, ec.ECDSA(SHA256()))
    except InvalidSignature as error:
        raise WireError(
            signer, "a signature that is not its node key's, or that was changed on the way"
        ) from error
    return control.decode(pb.UpdateStatement, signed.statement, signer)


def check(plan: pb.RoundPlan, report: pb.ClientReport, payload: bytes, public_key: bytes) -> None:
    """Check that a client signed this very reply to this very plan; the edge's side of `statement_of`.

    Raises
    ------
    WireError
        If it did not; the error says where its statement departs from the reply.
    """
    said = verify(report.signed, public_key, report.client)
    if fault := mismatch(said, statement_of(plan, report, payload)):
        raise WireError(report.client, fault)


def mismatch(said: pb.UpdateStatement, expected: pb.UpdateStatement) -> str:
    """Say in a few words where a statement departs from the one that is expected ("" where it does not)."""
    for field in pb.UpdateStatement.DESCRIPTOR.fields:
        theirs, ours = getattr(said, field.name), getattr(expected, field.name)
        if theirs != ours:
            other = _MISMATCH.get(field.name, f"{field.name} {theirs!r}, this is {field.name} {ours!r}")
            return f"its signature is for {other}"
    return "" if said == expected else "its signature is for more than this version knows"


def _half(curve: ec.EllipticCurve) -> int:
    return (curve.key_size + 7) // 8


@lru_cache(maxsize=4096)
def _load(public_key: bytes) -> ec.EllipticCurvePublicKey | None:
    try:
        key = load_pem_public_key(public_key)
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, ec.EllipticCurvePublicKey) else None
