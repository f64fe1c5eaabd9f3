"""A server that a node connects to, and what its errors mean for what to do next."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import grpc
from flwr.supercore.error import ApiErrorCode, FlowerError

#: Metadata of a poll: which process it comes from, as a copy of a device may use the same key.
POLLER_HEADER = "espalier-poller"
#: Metadata of a poll: which message this process got last, so that a server of ours needs no call to be told.
GOT_HEADER = "espalier-got"


class HomeFault(Exception):  # noqa: N818 - an outcome to act upon
    """A call to a home failed."""


class HomeUnavailable(HomeFault):
    """Nobody answers, for now: try again."""


class HomeUntrusted(HomeUnavailable):
    """Somebody answers, but not with a certificate (or a plain connection) that this node accepts: try again."""


class NodeForgotten(HomeFault):
    """The server does not know this node (it was restarted): register and activate again."""


class MessageGone(HomeFault):
    """The run is over, or the server has given this message up: drop it."""


class HomeRefused(HomeFault):
    """The server answers, and refuses."""


class KeyRefused(HomeRefused):
    """The server admits registered keys only, and this node's is none of them."""


#: What gRPC says when two ends cannot agree on a secure connection, and what that means.
TLS_FAULTS = {
    "certificate has expired": "its certificate has expired; renew it there: espalier certs … --renew",
    "certificate is not yet valid": "its certificate is not valid yet; set the clocks, e.g. by NTP",
    "CERTIFICATE_VERIFY_FAILED": "no authority in --root-certificates signed its certificate; "
    "give this machine the ca.pem that it was made with",
    "Hostname Verification Check failed": "its certificate does not stand for this address; "
    "use a name that it has, or make it anew there: espalier certs … --host HOST --renew",
    "WRONG_VERSION_NUMBER": "it does not speak TLS; start it with a certificate",
    "create security handshaker": "--root-certificates holds no certificate that can be read",
    "Socket closed": "it hung up at once; if it speaks TLS, give --root-certificates",
}


@dataclass(frozen=True)
class Home:
    """One server to connect to.

    Parameters
    ----------
    address : str
        HOST:PORT of its Fleet API.
    root_certificates : bytes, optional
        PEM certificates that its own must be signed by; None means those of the system.
    insecure : bool
        Without TLS.
    """

    address: str
    root_certificates: bytes | None = None
    insecure: bool = False


def outcome(call: Any) -> Any:
    """Wait for a call and return its answer; the wait costs nothing, where gRPC's own looks up ten times a second.

    Raises
    ------
    HomeFault
        That says what to do next.
    """
    done = threading.Event()
    call.add_done_callback(lambda _: done.set())
    done.wait()
    try:
        return call.result()
    except grpc.RpcError as error:
        raise fault_of(error) from error
    except grpc.FutureCancelledError as error:
        raise HomeUnavailable("the connection was closed") from error


def flower_code(refused: HomeRefused) -> int | None:
    """Return Flower's own error code of a refusal, if it carries one."""
    error = refused.__cause__
    said = FlowerError.from_json(error.details()) if isinstance(error, grpc.RpcError) else None
    return None if said is None else int(said.code)


def fault_of(error: grpc.RpcError) -> HomeFault:
    """Translate a gRPC error into what to do next."""
    code = error.code()
    details = " ".join((error.details() or "").split())[:300]
    said = FlowerError.from_json(error.details())
    if said is not None:
        if said.code == ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED:
            return MessageGone("the run is over")
        extra = f" ({said.public_details})" if said.public_details else ""
        return HomeRefused(f"[{int(said.code)}] {said.message}{extra}")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        if "failed to connect" in details:
            for sign, meaning in TLS_FAULTS.items():
                if sign in details:
                    return HomeUntrusted(meaning)
        return HomeUnavailable(details or str(code.name))
    if code is grpc.StatusCode.UNAUTHENTICATED:
        if "timestamp" in details:
            return HomeRefused("the clocks of this machine and the server differ; set them, e.g. by NTP")
        return NodeForgotten(details)
    return HomeRefused(f"{code.name}: {details}")
