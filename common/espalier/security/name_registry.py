"""Which node key owns which client or edge name, stored on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from espalier.errors import StateError, WireError
from espalier.storage.json_file import write_json

#: File names of the registries in state folders: the clients' names at an edge, the edges' names at a cloud.
CLIENT_NAMES, EDGE_NAMES = "names.json", "edges.json"


class Claims(Protocol):
    """Decides whether a node may use a name; `espalier.security.keys.KeyRegistry` is another implementation."""

    def claim(self, name: str, public_key: bytes) -> None:
        """Bind a name to a key, or raise WireError if the key may not use it."""


class NameRegistry:
    """Which public key owns which name; a name belongs to the first key that claims it.

    Registering a key with a name (`flwr supernode register KEY.pub NAME`) also claims the name.

    Parameters
    ----------
    path : Path
        JSON file, created by the first claim.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read()

    def _read(self) -> dict[str, str]:
        try:
            held: dict[str, str] = json.loads(self.path.read_text()) if self.path.exists() else {}
        except (OSError, ValueError) as error:
            raise StateError(
                f"{self.path} is damaged ({error}); remove it to let every client claim its name again"
            ) from error
        return held

    def owners(self) -> dict[bytes, str]:
        """Return the name of each key."""
        return {bytes.fromhex(key): name for name, key in self._read().items()}

    def claim(self, name: str, public_key: bytes) -> None:
        """Bind a name to a key.

        Raises
        ------
        WireError
            If another key owns the name, or the key owns another name.
        """
        keys = self._read()  # `espalier clients forget` may have changed it
        key = public_key.hex()
        owner = keys.get(name)
        if owner == key:
            return
        if owner is not None:
            raise WireError(
                name, "another node key owns this name; give the client its own --name or its old --state"
            )
        if names := [n for n, k in keys.items() if k == key]:
            raise WireError(name, f"its node key already goes by the name {names[0]!r}")
        self._write(keys | {name: key})

    def forget(self, name: str) -> bool:
        """Release a name so that another key may claim it; return whether it was claimed."""
        keys = self._read()
        known = keys.pop(name, None) is not None
        if known:
            self._write(keys)
        return known

    def _write(self, keys: dict[str, str]) -> None:
        write_json(self.path, keys)
