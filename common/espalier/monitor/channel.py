"""gRPC channels to the monitor and health services, with errors that name the cause."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from espalier.errors import AddressError, ConfigError
from espalier.security.transport import Security, parse_address

if TYPE_CHECKING:
    import grpc


@contextmanager
def open_channel(address: str, security: Security, server_name: str = "") -> Iterator[grpc.Channel]:
    """Yield a channel to a server; an RPC error of a call over it becomes an `EspalierError`.

    Parameters
    ----------
    address : str
        HOST:PORT.
    security : Security
        With `root_certificates` the channel is TLS.
    server_name : str
        Name that the certificate must be valid for, if it is not the host of the address.

    Raises
    ------
    AddressError
        The server does not answer, its certificate is not valid, or it has no such service.
    ConfigError
        The link may not be plain, or the certificates are not a PEM file.
    """
    import grpc

    parse_address(address)
    roots = security.client_roots(address)
    options = [("grpc.enable_retries", 0)]
    if roots is None:
        channel = grpc.insecure_channel(address, options=options)
    else:
        if server_name:
            options.append(("grpc.ssl_target_name_override", server_name))  # type: ignore[arg-type]
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(roots), options=options)
    try:
        yield channel
    except grpc.RpcError as error:
        raise AddressError(f"{address}: {_meaning(error, secure=roots is not None)}") from error
    except ValueError as error:  # gRPC raises it for root certificates that it cannot read
        raise ConfigError(f"--root-certificates {security.root_certificates}: {error}") from error
    finally:
        channel.close()


def _meaning(error: grpc.RpcError, *, secure: bool) -> str:
    import grpc

    code, details = error.code(), " ".join(str(error.details()).split())
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return "the server has no such service; is it the port of an edge or of --monitor?"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "no answer in time; is the process stopped, or the network cut?"
    if code is not grpc.StatusCode.UNAVAILABLE:
        return f"{code.name.lower().replace('_', ' ')}: {details}"
    if "certificate" in details.lower() or "handshake" in details.lower() or "ssl" in details.lower():
        return f"the TLS handshake failed ({details}); check --root-certificates and the server's certificate"
    if not secure and ("socket closed" in details.lower() or "http2" in details.lower()):
        return f"the connection was closed ({details}); if the server uses TLS, give --root-certificates"
    return f"no answer ({details}); is it running, and is the address right?"
