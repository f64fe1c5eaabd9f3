"""Signed updates: a client signs a statement about its reply, so that no server on the path can forge one."""

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

#: Prefix of the signed bytes (domain separation): Flower signs other data with the same key.
DOMAIN = b"espalier.v1.UpdateStatement\0"

#: Fields of a ClientReport that describe the payload; only the edge receives them.
FORM = ("sections", "table", "architecture")

#: Error message for an update without a signature.
UNSIGNED = (
    "an update without a signature; run our client, or name a SuperNode's key file in its node config "
    '(key="…"), or set require-signatures=false'
)

_MISMATCH = {
    "architecture": "another architecture than the one sent",
    "payload": "another payload than the one received",
    "form": "another layout of the payload than the one received",
    "report": "another report than the one received",
    "nonce": "another plan than this one",
}


def digest(message: Proto) -> bytes:
    """Return the SHA-256 of a protobuf in deterministic serialization."""
    return hashlib.sha256(message.SerializeToString(deterministic=True)).digest()


def payload_digest(records: Mapping[str, ArrayRecord]) -> bytes:
    """Return the SHA-256 of a payload: of the keys and the content ids of its ArrayRecords."""
    whole = hashlib.sha256()
    for key, record in sorted(records.items()):
        name = key.encode()
        whole.update(len(name).to_bytes(4, "big") + name + content_id(record))
    return whole.digest()


def statement_of(plan: pb.RoundPlan, report: pb.ClientReport, payload: bytes) -> pb.UpdateStatement:
    """Return the statement about a reply, which the client signs and the edge compares.

    Parameters
    ----------
    plan : pb.RoundPlan
        The plan that the reply answers.
    report : pb.ClientReport
        The reply's report; the statement does not cover `up_bytes`, which the edge measures.
    payload : bytes
        Digest of the reply's payload; see `payload_digest`.
    """
    stripped, form = pb.ClientReport(), pb.ClientReport()
    stripped.CopyFrom(report)
    form.sections.extend(stripped.sections)
    for name in ("table", "architecture"):
        if stripped.HasField(name):
            getattr(form, name).CopyFrom(getattr(stripped, name))
    for name in FORM:
        stripped.ClearField(name)
    stripped.ClearField("signed")
    stripped.ClearField("up_bytes")
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
        report=digest(stripped),
    )


def sign(statement: pb.UpdateStatement, key: ec.EllipticCurvePrivateKey) -> pb.SignedStatement:
    """Sign a statement with a node key."""
    content = statement.SerializeToString()
    size = _half(key.curve)
    # Fixed length: with DER encoding the size of a reply would vary.
    numbers = decode_dss_signature(key.sign(DOMAIN + content, ec.ECDSA(SHA256())))
    return pb.SignedStatement(
        statement=content, signature=b"".join(number.to_bytes(size, "big") for number in numbers)
    )


def verify(signed: pb.SignedStatement, public_key: bytes, signer: str) -> pb.UpdateStatement:
    """Check a signature and return the signed statement.

    Parameters
    ----------
    signed : pb.SignedStatement
        The received statement and signature.
    public_key : bytes
        PEM of the signer's node key, as registered at the receiver.
    signer : str
        Name of the signer, for error messages.

    Raises
    ------
    WireError
        If the signature does not match the key, or the signed bytes are not a statement.
    """
    key = _load(public_key)
    if key is None:
        raise WireError(signer, "a signature, but its node key is not an elliptic-curve key")
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
    """Check that a client signed exactly this reply to exactly this plan.

    Raises
    ------
    WireError
        If it did not; the message names the first difference.
    """
    statement = verify(report.signed, public_key, report.client)
    if fault := mismatch(statement, statement_of(plan, report, payload)):
        raise WireError(report.client, fault)


def mismatch(statement: pb.UpdateStatement, expected: pb.UpdateStatement) -> str:
    """Return a short description of the first difference between a statement and the expected one, or ""."""
    for field in pb.UpdateStatement.DESCRIPTOR.fields:
        theirs, ours = getattr(statement, field.name), getattr(expected, field.name)
        if theirs != ours:
            other = _MISMATCH.get(field.name, f"{field.name} {theirs!r}, this is {field.name} {ours!r}")
            return f"its signature is for {other}"
    return "" if statement == expected else "its signature covers fields that this version does not know"


def _half(curve: ec.EllipticCurve) -> int:
    return (curve.key_size + 7) // 8


@lru_cache(maxsize=4096)
def _load(public_key: bytes) -> ec.EllipticCurvePublicKey | None:
    try:
        key = load_pem_public_key(public_key)
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, ec.EllipticCurvePublicKey) else None
