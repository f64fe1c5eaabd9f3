"""Names of clients and edges: plain, because they appear in files and reports, and owned by a node key."""

from __future__ import annotations

import json
import re
from pathlib import Path

from common.errors import StateError, WireError
from common.run.jsonfile import write_text

NAME_RULE = "1 to 64 letters, digits, '.', '-' or '_', no sign at either end"
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
        try:
            self._keys: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise StateError(
                f"{path} is damaged ({error}); remove it to let every client claim its name again"
            ) from error

    def owners(self) -> dict[bytes, str]:
        """Return the name of each key."""
        return {bytes.fromhex(key): name for name, key in self._keys.items()}

    def claim(self, name: str, public_key: bytes) -> None:
        """Bind a name to a key.

        Raises
        ------
        WireError
            If another key owns the name, or the key owns another name.
        """
        key = public_key.hex()
        owner = self._keys.get(name)
        if owner == key:
            return
        if owner is not None:
            raise WireError(
                name, "another node key owns this name; give the client its own --name or its old --state"
            )
        if names := [n for n, k in self._keys.items() if k == key]:
            raise WireError(name, f"its node key already goes by the name {names[0]!r}")
        self._keys[name] = key
        write_text(self.path, json.dumps(self._keys, indent=1) + "\n")
