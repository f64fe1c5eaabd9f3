"""The clients' public keys as the cloud knows them: those a person registered, else the first that was seen."""

from __future__ import annotations

from pathlib import Path

from common.errors import WireError
from common.keys import CLIENT_KEYS, KeyRegistry
from common.names import CLIENT_NAMES, NameRegistry


class ClientKeys:
    """Whose signature counts.

    Once there is a registry (`espalier clients add`), only its keys do. Without one, on a loopback demo, the
    first key that comes with a name stays bound to it: an edge can make a client up, but not speak for one
    that the cloud has met.

    Parameters
    ----------
    state : Path
        The cloud's state folder.
    """

    def __init__(self, state: Path) -> None:
        self._registry = KeyRegistry(state / CLIENT_KEYS)
        self._seen = NameRegistry(state / CLIENT_NAMES)

    @property
    def registered(self) -> bool:
        """Whether keys are registered at all."""
        return self._registry.path.exists()

    def claim(self, name: str, public_key: bytes) -> None:
        """Check the key that an edge says a client proved to it.

        Raises
        ------
        WireError
            If it is not the client's.
        """
        if not public_key:
            raise WireError(name, "its edge does not say which node key it has")
        (self._registry if self.registered else self._seen).claim(name, public_key)

    def in_force(self) -> dict[str, bytes]:
        """Return the public keys that count now, by client."""
        if self.registered:
            return {e.name: e.public_key for e in self._registry.entries() if not e.revoked}
        return {name: key for key, name in self._seen.owners().items()}
