"""Checks whether a server admits a node: activates the node and deactivates it again."""

from __future__ import annotations

import threading

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.error import ApiErrorCode

from espalier.errors import AddressError, EspalierError
from espalier.flower.fleet_client import FleetClient
from espalier.flower.upstreams import (
    Upstream,
    UpstreamError,
    UpstreamRefusedError,
    UpstreamUnavailableError,
    flower_error_code,
)


def try_admission(upstream: Upstream, key: ec.EllipticCurvePrivateKey, remembered: int | None) -> str:
    """Activate a node at a server, deactivate it, and return a sentence that says it was admitted.

    Use it only for a key that no running process uses: the server considers the node online meanwhile.

    Parameters
    ----------
    upstream : Upstream
        The server.
    key : EllipticCurvePrivateKey
        The node's key.
    remembered : int or None
        The node id that the server assigned before; used to end the lease of a process that was killed.

    Raises
    ------
    EspalierError
        The server does not answer or refuses the node; the message says how to fix it.
    """
    client = FleetClient(upstream, key, threading.Event())
    try:
        client.join(remembered)
    except UpstreamRefusedError as refused:
        if "timestamp" in str(refused).lower():
            raise EspalierError(
                "it rejects the timestamp of this node's signature: the two clocks differ by minutes; "
                "set both clocks, e.g. by NTP"
            ) from refused
        if flower_error_code(refused) == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
            raise EspalierError(
                "it does not admit this key: the key is not registered, or a process that used it was just "
                "killed; register the .pub key there (`espalier clients add`, `espalier edges add`), or wait 20 s"
            ) from refused
        raise EspalierError(
            f"it refuses this node ({refused}); check that both run the same versions"
        ) from refused
    except UpstreamUnavailableError as fault:
        raise AddressError(f"it does not answer as a Fleet server ({fault}); check the port") from fault
    except UpstreamError as fault:
        raise EspalierError(f"it does not admit this node ({fault}); try again") from fault
    finally:
        client.close()
    return "it admits this node's key; clocks and Flower versions are compatible"
