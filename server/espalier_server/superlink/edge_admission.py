"""Admits the edges whose keys are registered, and no others, at the SuperLink, through its Control API."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable

from espalier.errors import EspalierError, StateError
from espalier.security.keys import KeyRegistry
from espalier.security.refusals import Refusals
from espalier_server.superlink.clouds import Cloud
from espalier_server.superlink.control_api import register_node, unregister_node

log = logging.getLogger("espalier.cloud")

#: Seconds after which a request that the SuperLink refused is sent again.
RETRY_SECONDS = 30.0
#: A refused key in the SuperLink's log, formatted as a Python bytes literal.
_REFUSED = re.compile(
    rb"ActivateNode.*(-----BEGIN PUBLIC KEY-----\\n[A-Za-z0-9+/=\\]{1,400}\\n-----END PUBLIC KEY-----)"
    rb".*No SuperNode found"
)
_LOG_READ = 1 << 20  # maximum number of bytes of the log to read at a time


class EdgeAdmission:
    """Registers and unregisters nodes at a SuperLink according to the registry of edges.

    Parameters
    ----------
    cloud : Cloud
        The cloud of the SuperLink, which is called at its control address.
    registry : KeyRegistry
        The registered edges; another process may change it.
    """

    def __init__(self, cloud: Cloud, registry: KeyRegistry) -> None:
        self._cloud = cloud
        self._registry = registry
        self._admitted: dict[bytes, tuple[str, int]] = {}  # name and Flower's node id by key
        self._retry_at: dict[bytes, float] = {}
        self._logged = ""
        self._refusals = Refusals(registry, "espalier edges add", log)
        self._log = cloud.folder / "superlink.log"
        self._offset = 0

    def register_all(self) -> None:
        """Register every key at a SuperLink that was just started, which knows none."""
        self._admitted.clear()
        self._retry_at.clear()
        self._offset = self._log.stat().st_size if self._log.exists() else 0
        self.update()
        if not self._admitted:
            log.warning(
                "no edge is registered in %s, so none can connect; espalier edges add NAME KEY.pub --state %s",
                self._registry.path,
                self._registry.path.parent,
            )

    def update(self) -> None:
        """Make the SuperLink admit exactly the valid keys of the registry, and log the nodes that it refused.

        If the registry's file is damaged, the admitted edges do not change.
        """
        try:
            wanted = self._registry.owners()
        except StateError as error:
            if str(error) != self._logged:
                self._logged = str(error)
                log.error("%s", error)
            return
        self._logged = ""
        gone = [key for key, (name, _) in self._admitted.items() if wanted.get(key) != name]
        self._each(self._drop, [(key, self._admitted[key][0]) for key in gone])
        self._each(self._admit, [(key, name) for key, name in wanted.items() if key not in self._admitted])
        self._read_refusals()

    def _each(self, act: Callable[[bytes, str], None], keys: list[tuple[bytes, str]]) -> None:
        """Call `act` for each key and name; log a failure and retry it later."""
        for key, name in keys:
            if self._retry_at.get(key, 0.0) > time.monotonic():
                continue
            try:
                act(key, name)
            except EspalierError as error:
                self._retry_at[key] = time.monotonic() + RETRY_SECONDS
                log.error("edge %s: %s; retrying in %g s", name, error, RETRY_SECONDS)

    def _admit(self, key: bytes, name: str) -> None:
        node_id = register_node(self._cloud.control, self._cloud.root_certificates, key, name)
        self._admitted[key] = (name, node_id)
        log.info("edge %s is admitted", name)

    def _drop(self, key: bytes, name: str) -> None:
        unregister_node(self._cloud.control, self._cloud.root_certificates, self._admitted[key][1])
        del self._admitted[key]
        log.warning("edge %s is no longer admitted", name)

    def _read_refusals(self) -> None:
        """Log the refusals in the SuperLink's log, as its API does not report them."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._offset)
                text = file.read(_LOG_READ)
        except OSError:
            return
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        for key in _REFUSED.findall(complete):
            self._refusals(key.replace(b"\\n", b"\n"))
