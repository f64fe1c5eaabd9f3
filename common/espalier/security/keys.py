"""The registry of node keys that a server admits: one name per key, in a file that is reread when it changes."""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)

from espalier.errors import ConfigError, StateError, WireError
from espalier.names import NAME_RULE, is_name
from espalier.storage.json_file import write_json
from espalier.storage.lock import locked_file

#: In a cloud's or an edge's state folder: clients whose contributions count.
CLIENT_KEYS = "clients.json"
#: In a cloud's state folder: edges that the SuperLink admits.
EDGE_KEYS = "edge-keys.json"
#: Environment variable of a cloud's ServerApp; set if the SuperLink admits registered edges only.
KEYS_ONLY = "ESPALIER_KEYS_ONLY"
#: The curves that Flower's registration accepts.
CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


def canonical(public_key: bytes, owner: str) -> bytes:
    """Return a node's public key in Flower's format: PEM, SubjectPublicKeyInfo.

    Parameters
    ----------
    public_key : bytes
        PEM, or OpenSSH's ``ecdsa-sha2-…`` line.
    owner : str
        Its owner, for the error message.

    Raises
    ------
    StateError
        If it is not a public key on a NIST curve.
    """
    load = load_pem_public_key if public_key.lstrip().startswith(b"-----") else load_ssh_public_key
    try:
        key = load(public_key.strip())
    except (ValueError, UnsupportedAlgorithm) as fault:
        raise StateError(
            f"the public key of {owner!r} cannot be read ({fault}); give the .pub file of its node key"
        ) from fault
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, CURVES):
        raise StateError(
            f"the public key of {owner!r} is no elliptic-curve key on P-256, P-384 or P-521; "
            "make one with `espalier certs client`"
        )
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def openssh(public_key: bytes) -> bytes:
    """Return a canonical public key as an OpenSSH line, the format of `flwr supernode register`."""
    return load_pem_public_key(public_key).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"


def fingerprint(public_key: bytes) -> str:
    """Return the fingerprint of a canonical public key in the format of ``ssh-keygen -l``."""
    blob = base64.b64decode(openssh(public_key).split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


@dataclass(frozen=True)
class Entry:
    """A registered key.

    Attributes
    ----------
    name : str
        Of the client or edge.
    public_key : bytes
        In `canonical` form.
    added : str
        When, ISO 8601 in UTC.
    revoked : bool
        Whether it was revoked. A revoked key stays in the file so that it cannot be registered under another name.
    """

    name: str
    public_key: bytes
    added: str
    revoked: bool = False


class KeyRegistry:
    """Public node keys by name, in a file that several processes share.

    A key has one name. A name has at most one valid key, and any number of revoked ones.

    Parameters
    ----------
    path : Path
        JSON file, created by the first `add`.

    Raises
    ------
    StateError
        On construction and on every call, if the file is damaged or cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._entries: tuple[Entry, ...] = ()
        self.entries()

    # --- asking ------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """Return all keys: valid ones first, then by name."""
        with self._lock:
            self._read()
            return sorted(self._entries, key=lambda e: (e.revoked, e.name, e.added))

    def key(self, name: str) -> bytes | None:
        """Return the valid key of a name; None if the name is unknown or its key was revoked."""
        return next((e.public_key for e in self.entries() if e.name == name and not e.revoked), None)

    def name_of(self, public_key: bytes) -> str | None:
        """Return the name of a canonical key; None if the key is unknown or was revoked."""
        entry = self._of(public_key)
        return None if entry is None or entry.revoked else entry.name

    def owners(self) -> dict[bytes, str]:
        """Return the name of each valid key."""
        return {e.public_key: e.name for e in self.entries() if not e.revoked}

    def claim(self, name: str, public_key: bytes) -> None:
        """Check that a node's key is registered under the name that it uses.

        Raises
        ------
        WireError
            If it is not; the message says how the key is registered.
        """
        entry = self._of(public_key)
        if entry is None:
            raise WireError(name, f"its node key is not registered in {self.path.name}")
        if entry.revoked:
            raise WireError(name, f"its node key, registered as {entry.name!r}, was revoked")
        if entry.name != name:
            raise WireError(name, f"its node key is registered as {entry.name!r}; start it with that --name")

    def _of(self, public_key: bytes) -> Entry | None:
        return next((e for e in self.entries() if e.public_key == public_key), None)

    # --- changing ----------------------------------------------------------------------------------

    def add(self, name: str, public_key: bytes) -> Entry:
        """Register a key (PEM or OpenSSH); registering it again under the same name has no effect.

        Raises
        ------
        ConfigError
            If the name is invalid or has another key, or the key has another name or was revoked.
        StateError
            If it is not a public key that Flower accepts.
        """
        if not is_name(name):
            raise ConfigError(f"{name!r} is no name; use {NAME_RULE}")
        key = canonical(public_key, name)
        with self._changing() as entries:
            for entry in entries:
                if entry.public_key == key and entry.revoked:
                    raise ConfigError(
                        f"this key was revoked (as {entry.name!r}); make {name} a new one, "
                        f"or forget {entry.name} first to trust the key again"
                    )
                if entry.public_key == key and entry.name != name:
                    raise ConfigError(f"this key is registered as {entry.name!r}; a key has one name")
                if entry.public_key == key:
                    return entry
                if entry.name == name and not entry.revoked:
                    raise ConfigError(f"{name} is registered with another key; revoke or forget it first")
            new = Entry(name, key, datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
            entries.append(new)
            return new

    def revoke(self, name: str) -> Entry:
        """Revoke the valid key of a name; return its entry.

        Raises
        ------
        ConfigError
            If the name has no valid key.
        """
        with self._changing() as entries:
            for number, entry in enumerate(entries):
                if entry.name == name and not entry.revoked:
                    entries[number] = replace(entry, revoked=True)
                    return entries[number]
            raise ConfigError(f"{name!r} has no key in force in {self.path}; see who has with `list`")

    def forget(self, name: str) -> list[Entry]:
        """Remove all keys of a name, including revoked ones, and return them."""
        with self._changing() as entries:
            gone = [entry for entry in entries if entry.name == name]
            entries[:] = [entry for entry in entries if entry.name != name]
            return gone

    # --- the file ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _changing(self) -> Iterator[list[Entry]]:
        """Yield the entries to modify, holding the lock of the file."""
        with locked_file(self.path), self._lock:
            self._read()
            entries = list(self._entries)
            yield entries
            if entries != list(self._entries):
                plain = [asdict(e) | {"public_key": e.public_key.decode()} for e in entries]
                write_json(self.path, plain, mode=0o600)

    def _read(self) -> None:
        """Read the file if it has changed."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            self._seen, self._entries = None, ()
            return
        except OSError as error:
            raise StateError(f"cannot read {self.path}: {error.strerror}; check its permissions") from error
        seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if seen == self._seen:
            return
        try:
            held = json.loads(self.path.read_text(encoding="utf-8"))
            self._entries = tuple(_entry(item) for item in held)
        except (OSError, ValueError, TypeError, KeyError, StateError) as error:
            raise StateError(
                f"{self.path} is damaged ({error}); mend it, or remove it and add the keys again"
            ) from error
        self._seen = seen


def _entry(item: dict[str, object]) -> Entry:
    name, key, added, revoked = (item[field] for field in ("name", "public_key", "added", "revoked"))
    if not (isinstance(name, str) and isinstance(key, str) and isinstance(added, str)) or not is_name(name):
        raise ValueError("an entry without a name, a key or a time")
    if not isinstance(revoked, bool):  # a typing error must not restore a revoked key
        raise ValueError(f"{name}: revoked is neither true nor false")
    return Entry(name, canonical(key.encode(), name), added, revoked)
