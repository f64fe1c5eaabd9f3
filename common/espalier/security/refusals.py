"""Log lines on nodes that a server did not admit: who, why, what to do; each key once in a while."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict

from espalier.errors import EspalierError
from espalier.security.keys import KeyRegistry, canonical, fingerprint

AGAIN_SECONDS = 600.0
KEYS_REMEMBERED = 1000


class Refusals:
    """Says why a node's key is not admitted.

    Parameters
    ----------
    registry : KeyRegistry
        Who is admitted.
    command : str
        What admits somebody, e.g. ``"espalier clients add"``.
    log : logging.Logger
        Where to say it.
    """

    def __init__(self, registry: KeyRegistry, command: str, log: logging.Logger) -> None:
        self._registry = registry
        self._command = command
        self._log = log
        self._lock = threading.Lock()
        self._told: OrderedDict[tuple[bytes, bool], float] = OrderedDict()

    def __call__(self, public_key: bytes, peer: str = "") -> None:
        """Say it, unless that was done lately.

        Parameters
        ----------
        public_key : bytes
            PEM or OpenSSH; comes from the network, so it may be anything.
        peer : str
            The node's address, if it is known.
        """
        node = f"a node at {peer}" if peer else "a node"
        try:
            key = canonical(public_key, node)
            entry = next((e for e in self._registry.entries() if e.public_key == key), None)
        except EspalierError as error:
            self._log.warning("refused %s: %s", node, str(error)[:300])
            return
        revoked = entry is not None and entry.revoked
        with self._lock:
            told = self._told.pop((key, revoked), -AGAIN_SECONDS)
            recently = time.monotonic() - told < AGAIN_SECONDS
            self._told[key, revoked] = told if recently else time.monotonic()
            while len(self._told) > KEYS_REMEMBERED:
                self._told.popitem(last=False)
        if recently:
            return
        who, state = f"{node} with key {fingerprint(key)}", self._registry.path.parent
        if entry is not None and entry.revoked:
            self._log.warning(
                "refused %s: it is %s's, which was revoked; if it is to come back, make it a new key",
                who,
                entry.name,
            )
        else:
            self._log.warning(
                "refused %s: it is not registered; to admit it: %s NAME KEY.pub --state %s",
                who,
                self._command,
                state,
            )
