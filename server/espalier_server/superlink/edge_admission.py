"""Keeps the SuperLink to the edges whose keys are registered, through its Control API, while the registry changes."""

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

#: Seconds before what Flower refused is tried again.
AGAIN_SECONDS = 30.0
#: The SuperLink's log says which key it refused, as Python writes bytes.
_REFUSED = re.compile(
    rb"ActivateNode.*(-----BEGIN PUBLIC KEY-----\\n[A-Za-z0-9+/=\\]{1,400}\\n-----END PUBLIC KEY-----)"
    rb".*No SuperNode found"
)
_LOG_READ = 1 << 20  # bytes of it that are read at a time


class EdgeAdmission:
    """Registers and unregisters the nodes of a SuperLink as the registry of edges says.

    Parameters
    ----------
    cloud : Cloud
        The cloud whose SuperLink it is; it is reached by its control port.
    registry : KeyRegistry
        Which edges are admitted. Another process may change it.
    """

    def __init__(self, cloud: Cloud, registry: KeyRegistry) -> None:
        self._cloud = cloud
        self._registry = registry
        self._admitted: dict[bytes, tuple[str, int]] = {}  # name and Flower's node id by key
        self._later: dict[bytes, float] = {}
        self._told = ""
        self._refusals = Refusals(registry, "espalier edges add", log)
        self._log = cloud.folder / "superlink.log"
        self._offset = 0

    def start_over(self) -> None:
        """Register every key at a SuperLink that was just started, which knows none."""
        self._admitted.clear()
        self._later.clear()
        self._offset = self._log.stat().st_size if self._log.exists() else 0
        self.follow()
        if not self._admitted:
            log.warning(
                "no edge is registered in %s, so none can connect; espalier edges add NAME KEY.pub --state %s",
                self._registry.path,
                self._registry.path.parent,
            )

    def follow(self) -> None:
        """Make the SuperLink admit exactly the keys in force, and say whom it refused."""
        try:
            wanted = self._registry.owners()
        except StateError as error:  # a file damaged by hand: who was admitted stays so until it is mended
            if str(error) != self._told:
                self._told = str(error)
                log.error("%s", error)
            return
        self._told = ""
        gone = [key for key, (name, _) in self._admitted.items() if wanted.get(key) != name]
        self._each(self._drop, [(key, self._admitted[key][0]) for key in gone])
        self._each(self._admit, [(key, name) for key, name in wanted.items() if key not in self._admitted])
        self._read_refusals()

    def _each(self, act: Callable[[bytes, str], None], keys: list[tuple[bytes, str]]) -> None:
        """Do something for each key; what fails is told and tried again later."""
        for key, name in keys:
            if self._later.get(key, 0.0) > time.monotonic():
                continue
            try:
                act(key, name)
            except EspalierError as error:
                self._later[key] = time.monotonic() + AGAIN_SECONDS
                log.error("edge %s: %s; trying again in %g s", name, error, AGAIN_SECONDS)

    def _admit(self, key: bytes, name: str) -> None:
        node_id = register_node(self._cloud.control, self._cloud.root_certificates, key, name)
        self._admitted[key] = (name, node_id)
        log.info("edge %s is admitted", name)

    def _drop(self, key: bytes, name: str) -> None:
        unregister_node(self._cloud.control, self._cloud.root_certificates, self._admitted[key][1])
        del self._admitted[key]
        log.warning("edge %s is no longer admitted", name)

    def _read_refusals(self) -> None:
        """Say in this process's log what the SuperLink says in its own: it has no other way to tell."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._offset)
                text = file.read(_LOG_READ)
        except OSError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for key in _REFUSED.findall(whole):
            self._refusals(key.replace(b"\\n", b"\n"))
