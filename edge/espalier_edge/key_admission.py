"""Admits clients with registered keys to the edge's Fleet server, and applies changes of the registry."""

from __future__ import annotations

import logging
import threading

from espalier.errors import StateError
from espalier.security.keys import KeyRegistry
from espalier_edge.fleet.server import InlineFleet

log = logging.getLogger("espalier.edge")

#: Seconds between two reads of the registry.
READ_INTERVAL = 1.0


class KeyAdmission:
    """Synchronises the keys that a Fleet server admits with a registry.

    Parameters
    ----------
    fleet : InlineFleet
        The server; it must require keys.
    registry : KeyRegistry
        The clients that are admitted. Another process may change it.
    """

    def __init__(self, fleet: InlineFleet, registry: KeyRegistry) -> None:
        self._fleet = fleet
        self._registry = registry
        self._admitted: dict[bytes, str] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="admission", daemon=True)

    def start(self) -> None:
        """Admit the registered clients, and apply changes of the registry from now on.

        Raises
        ------
        StateError
            If the registry is damaged.
        """
        self.update()
        if not self._admitted:
            log.warning(
                "no client is registered in %s, so none can connect; espalier clients add NAME KEY.pub --state %s",
                self._registry.path,
                self._registry.path.parent,
            )
        self._thread.start()

    def stop(self) -> None:
        """Stop applying changes."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(2 * READ_INTERVAL)

    def update(self) -> None:
        """Make the server admit exactly the valid keys."""
        wanted = self._registry.owners()
        for key, name in list(self._admitted.items()):
            if wanted.get(key) != name:
                self._fleet.drop_key(key)
                del self._admitted[key]
                log.warning("client %s is no longer admitted", name)
        for key, name in wanted.items():
            if key not in self._admitted:
                self._fleet.register_key(key, name)
                self._admitted[key] = name
                log.info("client %s is admitted", name)

    def _watch(self) -> None:
        reported = ""
        while not self._stopped.wait(READ_INTERVAL):
            try:
                self.update()
                reported = ""
            except StateError as error:
                # The file is damaged: the admitted clients stay admitted until it is repaired.
                if str(error) != reported:  # log each error once, not every second
                    reported = str(error)
                    log.error("%s", error)
