"""Names of clients and edges: plain, because they appear in files and reports, and owned by a node key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Protocol

from espalier.errors import StateError, WireError
from espalier.storage.json_file import write_text

NAME_RULE = "1 to 64 letters, digits, '.', '-' or '_', no sign at either end"
#: Registries of this kind in state folders: an edge's, of its clients, and a cloud's, of its edges.
CLIENT_NAMES, EDGE_NAMES = "names.json", "edges.json"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")


def is_name(text: str) -> bool:
    """Whether `text` is a name, and so may become a folder's: see `NAME_RULE`."""
    return _NAME.fullmatch(text) is not None


def check_name(name: str) -> None:
    """Refuse a name that would not do as a file name.

    Raises
    ------
    WireError
        If it is none.
    """
    if not is_name(name):
        raise WireError(name[:64], f"a name is {NAME_RULE}")


class Claims(Protocol):
    """What decides whether a node may use the name it says: see also `espalier.security.keys.KeyRegistry`."""

    def claim(self, name: str, public_key: bytes) -> None:
        """Return if a name is the key's own, else raise WireError."""


class NameRegistry:
    """Which public key owns which name, kept on disk: the first key to use a name keeps it.

    A name that was registered with a key before (`flwr supernode register KEY.pub NAME`) counts
    as used by that key.

    Parameters
    ----------
    path : Path
        JSON file, made on the first claim.
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
        """Let another key claim a name; tell whether one had."""
        keys = self._read()
        known = keys.pop(name, None) is not None
        if known:
            self._write(keys)
        return known

    def _write(self, keys: dict[str, str]) -> None:
        write_text(self.path, json.dumps(keys, indent=1) + "\n")
