"""Would a server admit this node? Joins it for a moment and leaves again."""

from __future__ import annotations

import threading

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.error import ApiErrorCode

from espalier.errors import AddressError, EspalierError
from espalier.flower.fleet_client import FleetClient
from espalier.flower.upstreams import Home, HomeFault, HomeRefused, HomeUnavailable, flower_code


def try_admission(home: Home, key: ec.EllipticCurvePrivateKey, remembered: int | None) -> str:
    """Join a server with a node key and leave again; return what it said.

    Only for a key that no process uses now: the server takes the node for online until it has left.

    Parameters
    ----------
    home : Home
        The server.
    key : EllipticCurvePrivateKey
        The node's key.
    remembered : int or None
        The id that the server gave the node before; ends the lease of a process that was killed.

    Raises
    ------
    EspalierError
        It does not answer, or refuses; with what to do.
    """
    client = FleetClient(home, key, threading.Event())
    try:
        client.join(remembered)
    except HomeRefused as refused:
        if "timestamp" in str(refused).lower():
            raise EspalierError(
                "it refuses this node's signature for its time: the two clocks differ by minutes; "
                "set both clocks, e.g. by NTP"
            ) from refused
        if flower_code(refused) == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
            raise EspalierError(
                "it does not admit this key: it is not registered, or a process that uses it was just killed; "
                "register the .pub key there (`espalier clients add`, `espalier edges add`), or wait 20 s"
            ) from refused
        raise EspalierError(
            f"it refuses this node ({refused}); see that both run the same versions"
        ) from refused
    except HomeUnavailable as fault:
        raise AddressError(
            f"it does not answer as a Fleet server ({fault}); is it the right port?"
        ) from fault
    except HomeFault as fault:
        raise EspalierError(f"it does not admit this node ({fault}); try again") from fault
    finally:
        client.close()
    return "it admits this node's key, so the clocks agree and Flower's versions fit"
