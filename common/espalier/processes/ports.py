"""Whether a port of this machine is free to listen on."""

from __future__ import annotations

import errno
import socket

from espalier.errors import AddressError
from espalier.security.transport import Address


def check_free(address: Address, flag: str) -> None:
    """Check that this process can listen on an address.

    Raises
    ------
    AddressError
        It is in use or not an address of this machine; the message names the option `flag`.
    """
    try:
        family, kind, proto, _, target = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
    except socket.gaierror as error:
        raise AddressError(f"{flag} {address}: {error.strerror}; give an address of this machine") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressError(
                f"{flag} {address} is in use; stop the process that listens there or choose another port"
            ) from error
        raise AddressError(
            f"{flag} {address}: {error.strerror}; give an address and port of this machine"
        ) from error
