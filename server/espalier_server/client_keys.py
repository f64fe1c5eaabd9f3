"""The clients' public keys at the cloud: registered keys, or else the first key seen for each name."""

from __future__ import annotations

from pathlib import Path

from espalier.errors import WireError
from espalier.security.keys import CLIENT_KEYS, KeyRegistry
from espalier.security.name_registry import CLIENT_NAMES, NameRegistry


class ClientKeys:
    """The keys whose signatures the cloud accepts.

    If there is a registry (`espalier clients add`), or if the cloud admits registered keys only, these are the
    registered keys. Otherwise, e.g. in a demo on the loopback interface, the first key that is seen with a name is
    bound to it: an edge can then invent a client, but cannot impersonate one that the cloud knows.

    Parameters
    ----------
    state : Path
        The cloud's state folder.
    keys_only : bool
        Whether the cloud admits registered keys only; a missing registry then counts as empty.
    """

    def __init__(self, state: Path, *, keys_only: bool = False) -> None:
        self._keys_only = keys_only
        self._registry = KeyRegistry(state / CLIENT_KEYS)
        self._seen = NameRegistry(state / CLIENT_NAMES)

    @property
    def registered(self) -> bool:
        """Whether only registered keys are accepted."""
        return self._keys_only or self._registry.path.exists()

    def claim(self, name: str, public_key: bytes) -> None:
        """Check the key that a client proved to its edge, according to the edge.

        Raises
        ------
        WireError
            If it is missing, or not the key of the client of this name.
        """
        if not public_key:
            raise WireError(name, "its edge did not report its node key")
        if self.registered and not self._registry.path.exists():
            raise WireError(
                name, "no client's key is registered at the cloud; there: espalier clients add NAME KEY.pub"
            )
        (self._registry if self.registered else self._seen).claim(name, public_key)

    def in_force(self) -> dict[str, bytes]:
        """Return the accepted public keys by client."""
        if self.registered:
            return {e.name: e.public_key for e in self._registry.entries() if not e.revoked}
        return {name: key for key, name in self._seen.owners().items()}
