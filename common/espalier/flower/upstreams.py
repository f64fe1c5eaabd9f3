"""The address of a server that a node connects to, and exceptions that classify the errors of calls to it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import grpc
from flwr.supercore.error import ApiErrorCode, FlowerError

#: gRPC metadata of a poll: a random id of the polling process, as a copy of a device may use the same key.
POLLER_HEADER = "espalier-poller"
#: gRPC metadata of a poll: the id of the last message received; it saves the call that confirms it.
RECEIVED_HEADER = "espalier-got"


class UpstreamError(Exception):
    """A call to a server failed."""


class UpstreamUnavailableError(UpstreamError):
    """The server does not answer; retry later."""


class UpstreamUntrustedError(UpstreamUnavailableError):
    """The server answers, but TLS verification fails; retry later."""


class NodeUnknownError(UpstreamError):
    """The server does not know this node, e.g. after a restart; register and activate again."""


class MessageDiscardedError(UpstreamError):
    """The run has ended or the server has deleted the message; drop it."""


class UpstreamRefusedError(UpstreamError):
    """The server refuses the call."""


class KeyRefusedError(UpstreamRefusedError):
    """The server admits registered keys only, and this node's key is not registered."""


#: Substrings of gRPC's errors when a TLS handshake fails, and what each means to a user.
TLS_ERRORS = {
    "certificate has expired": "its certificate has expired; renew it there: espalier certs … --renew",
    "certificate is not yet valid": "its certificate is not valid yet; set the clocks, e.g. by NTP",
    "CERTIFICATE_VERIFY_FAILED": "no authority in --root-certificates signed its certificate; "
    "give this machine the ca.pem that it was made with",
    "Hostname Verification Check failed": "its certificate is not valid for this address; "
    "use a host name that it lists, or renew it there: espalier certs … --host HOST --renew",
    "WRONG_VERSION_NUMBER": "it does not speak TLS; start it with a certificate",
    "create security handshaker": "--root-certificates has no readable certificate",
    "Socket closed": "it closed the connection; if it speaks TLS, pass --root-certificates",
}


@dataclass(frozen=True)
class Upstream:
    """A server that a node connects to.

    Parameters
    ----------
    address : str
        HOST:PORT of its Fleet API.
    root_certificates : bytes, optional
        PEM root certificates to verify its certificate with; by default those of the system.
    insecure : bool
        Connect without TLS.
    """

    address: str
    root_certificates: bytes | None = None
    insecure: bool = False


def call_result(call: Any) -> Any:
    """Wait for a gRPC call and return its response.

    gRPC's own ``result()`` wakes ten times a second while it waits; an Event does not.

    Raises
    ------
    UpstreamError
        The subclass says how to proceed.
    """
    done = threading.Event()
    call.add_done_callback(lambda _: done.set())
    done.wait()
    try:
        return call.result()
    except grpc.RpcError as error:
        raise classify(error) from error
    except grpc.FutureCancelledError as error:
        raise UpstreamUnavailableError("the connection was closed") from error


def flower_error_code(refused: UpstreamRefusedError) -> int | None:
    """Return the Flower error code of a refusal, if it has one."""
    error = refused.__cause__
    said = FlowerError.from_json(error.details()) if isinstance(error, grpc.RpcError) else None
    return None if said is None else int(said.code)


def classify(error: grpc.RpcError) -> UpstreamError:
    """Translate a gRPC error into the exception that says how to proceed."""
    code = error.code()
    details = " ".join((error.details() or "").split())[:300]
    said = FlowerError.from_json(error.details())
    if said is not None:
        if said.code == ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED:
            return MessageDiscardedError("the run is over")
        extra = f" ({said.public_details})" if said.public_details else ""
        return UpstreamRefusedError(f"[{int(said.code)}] {said.message}{extra}")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        if "failed to connect" in details:
            for text, meaning in TLS_ERRORS.items():
                if text in details:
                    return UpstreamUntrustedError(meaning)
        return UpstreamUnavailableError(details or str(code.name))
    if code is grpc.StatusCode.UNAUTHENTICATED:
        if "timestamp" in details:
            return UpstreamRefusedError(
                "the clocks of this machine and the server differ; set them, e.g. by NTP"
            )
        return NodeUnknownError(details)
    return UpstreamRefusedError(f"{code.name}: {details}")
