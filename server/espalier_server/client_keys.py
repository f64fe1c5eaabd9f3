"""The clients' public keys as the cloud knows them: those a person registered, else the first that was seen."""

from __future__ import annotations

from pathlib import Path

from espalier.errors import WireError
from espalier.security.keys import CLIENT_KEYS, KeyRegistry
from espalier.security.name_registry import CLIENT_NAMES, NameRegistry


class ClientKeys:
    """Whose signature counts.

    Once there is a registry (`espalier clients add`), or where the cloud admits registered keys only, only its
    keys do. Else, as on a loopback demo, the first key that comes with a name stays bound to it: an edge can make
    a client up, but not speak for one that the cloud has met.

    Parameters
    ----------
    state : Path
        The cloud's state folder.
    keys_only : bool
        Whether the cloud admits registered keys only: then a missing registry is an empty one.
    """

    def __init__(self, state: Path, *, keys_only: bool = False) -> None:
        self._keys_only = keys_only
        self._registry = KeyRegistry(state / CLIENT_KEYS)
        self._seen = NameRegistry(state / CLIENT_NAMES)

    @property
    def registered(self) -> bool:
        """Whether only registered keys count."""
        return self._keys_only or self._registry.path.exists()

    def claim(self, name: str, public_key: bytes) -> None:
        """Check the key that an edge says a client proved to it.

        Raises
        ------
        WireError
            If it is not the client's.
        """
        if not public_key:
            raise WireError(name, "its edge does not say which node key it has")
        if self.registered and not self._registry.path.exists():
            raise WireError(
                name, "no client's key is registered at the cloud; there: espalier clients add NAME KEY.pub"
            )
        (self._registry if self.registered else self._seen).claim(name, public_key)

    def in_force(self) -> dict[str, bytes]:
        """Return the public keys that count now, by client."""
        if self.registered:
            return {e.name: e.public_key for e in self._registry.entries() if not e.revoked}
        return {name: key for key, name in self._seen.owners().items()}
