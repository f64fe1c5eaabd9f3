"""Registered node keys: which public key may use which name, as a person decided; read anew when the file changes."""

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
#: Set in the environment of a cloud's ServerApp where the SuperLink admits registered edges only.
KEYS_ONLY = "ESPALIER_KEYS_ONLY"
#: The curves that Flower's own registration takes.
CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


def canonical(public_key: bytes, owner: str) -> bytes:
    """Return a node's public key in the form in which Flower holds it: PEM, SubjectPublicKeyInfo.

    Parameters
    ----------
    public_key : bytes
        PEM, or OpenSSH's ``ecdsa-sha2-…`` line.
    owner : str
        Whose it is said to be, for the error.

    Raises
    ------
    StateError
        If it is no public key on a NIST curve.
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
    """Return a canonical public key as a line of OpenSSH's form, as `flwr supernode register` takes it."""
    return load_pem_public_key(public_key).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"


def fingerprint(public_key: bytes) -> str:
    """Return a canonical public key's fingerprint as ``ssh-keygen -l`` prints it."""
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
        Whether it lost its rights. It stays known so that it cannot come back under another name.
    """

    name: str
    public_key: bytes
    added: str
    revoked: bool = False


class KeyRegistry:
    """Public node keys by name, in a file that several processes share.

    A key has one name. A name has one key in force, and any number of revoked ones.

    Parameters
    ----------
    path : Path
        JSON file, made on the first `add`.

    Raises
    ------
    StateError
        Here and on every call: if the file is damaged or cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._entries: tuple[Entry, ...] = ()
        self.entries()

    # --- asking ------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """Return all keys, those in force before revoked ones, by name."""
        with self._lock:
            self._read()
            return sorted(self._entries, key=lambda e: (e.revoked, e.name, e.added))

    def key(self, name: str) -> bytes | None:
        """Return the key in force of a name; None if the name is unknown or its key revoked."""
        return next((e.public_key for e in self.entries() if e.name == name and not e.revoked), None)

    def name_of(self, public_key: bytes) -> str | None:
        """Return the name of a canonical key; None if the key is unknown or revoked."""
        entry = self._of(public_key)
        return None if entry is None or entry.revoked else entry.name

    def owners(self) -> dict[bytes, str]:
        """Return the name of each key in force."""
        return {e.public_key: e.name for e in self.entries() if not e.revoked}

    def claim(self, name: str, public_key: bytes) -> None:
        """Check that a node that calls itself `name` holds the key registered under it.

        Raises
        ------
        WireError
            If it does not; it says what the registry knows of the name and the key.
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
        """Register a key (PEM or OpenSSH); the same key under the same name again changes nothing.

        Raises
        ------
        ConfigError
            If the name is none, has another key, or the key has another name or was revoked.
        StateError
            If it is no public key that Flower takes.
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
        """Take the rights of a name's key; return it.

        Raises
        ------
        ConfigError
            If the name has no key in force.
        """
        with self._changing() as entries:
            for number, entry in enumerate(entries):
                if entry.name == name and not entry.revoked:
                    entries[number] = replace(entry, revoked=True)
                    return entries[number]
            raise ConfigError(f"{name!r} has no key in force in {self.path}; see who has with `list`")

    def forget(self, name: str) -> list[Entry]:
        """Remove all keys of a name, revoked ones too; return them, possibly none."""
        with self._changing() as entries:
            gone = [entry for entry in entries if entry.name == name]
            entries[:] = [entry for entry in entries if entry.name != name]
            return gone

    # --- the file ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _changing(self) -> Iterator[list[Entry]]:
        """Yield the entries to change, with other processes kept from changing them meanwhile."""
        with locked_file(self.path), self._lock:
            self._read()
            entries = list(self._entries)
            yield entries
            if entries != list(self._entries):
                plain = [asdict(e) | {"public_key": e.public_key.decode()} for e in entries]
                write_json(self.path, plain, mode=0o600)

    def _read(self) -> None:
        """Read the file if it is not the one that was read last."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            self._seen, self._entries = None, ()
            return
        except OSError as error:
            raise StateError(f"cannot read {self.path}: {error.strerror}; see to rights there") from error
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
    if not isinstance(revoked, bool):  # a typing error must not put a key back in force
        raise ValueError(f"{name}: revoked is neither true nor false")
    return Entry(name, canonical(key.encode(), name), added, revoked)
