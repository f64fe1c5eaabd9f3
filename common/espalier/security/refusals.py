"""Log messages about nodes that a server refused: node, reason and remedy, at most once per key in 10 minutes."""

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
    """Logs why the key of a node is not admitted.

    Parameters
    ----------
    registry : KeyRegistry
        The keys that are admitted.
    command : str
        The command that registers a key, e.g. ``"espalier clients add"``.
    log : logging.Logger
        The logger.
    """

    def __init__(self, registry: KeyRegistry, command: str, log: logging.Logger) -> None:
        self._registry = registry
        self._command = command
        self._log = log
        self._lock = threading.Lock()
        self._logged: OrderedDict[tuple[bytes, bool], float] = OrderedDict()

    def __call__(self, public_key: bytes, peer: str = "") -> None:
        """Log a refusal, unless the same key was logged recently.

        Parameters
        ----------
        public_key : bytes
            PEM or OpenSSH; comes from the network, so it may be anything.
        peer : str
            The node's address, if known.
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
            logged = self._logged.pop((key, revoked), -AGAIN_SECONDS)
            recently = time.monotonic() - logged < AGAIN_SECONDS
            self._logged[key, revoked] = logged if recently else time.monotonic()
            while len(self._logged) > KEYS_REMEMBERED:
                self._logged.popitem(last=False)
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
