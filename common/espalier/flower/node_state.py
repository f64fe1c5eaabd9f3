"""What a resident node keeps on disk: its key, its node id at each home, and the state of its runs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.supercore.primitives.asymmetric import private_key_to_bytes
from google.protobuf.message import DecodeError

from espalier.errors import StateError
from espalier.storage.atomic import write_bytes
from espalier.storage.json_file import write_json


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a node key: an EC private key without a passphrase, PEM or OpenSSH.

    Raises
    ------
    StateError
        If the file cannot be read or is no such key.
    """
    try:
        content = path.read_bytes()
    except OSError as fault:
        raise StateError(f"cannot read the key {path}: {fault.strerror}") from fault
    load = load_ssh_private_key if b"OPENSSH" in content[:60] else load_pem_private_key
    try:
        key = load(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as fault:
        raise StateError(f"{path} is no private key without a passphrase: {fault}") from fault
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StateError(
            f"{path} is no elliptic-curve key; make one with: ssh-keygen -t ecdsa -b 384 -N '' -f FILE"
        )
    return key


def load_or_make_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read the node key, or make one (readable by its owner only) on the first start.

    Its public half, which servers register, is written beside it: NAME.pub for NAME.key.
    """
    if path.exists():
        key = load_key(path)
    else:
        # P-256: signed and verified with every call, and ten times faster than P-384 in OpenSSL.
        key = ec.generate_private_key(ec.SECP256R1())
        write_bytes(path, private_key_to_bytes(key), mode=0o600)
    if not path.with_suffix(".pub").exists():
        line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        write_bytes(path.with_suffix(".pub"), line + b"\n")
    return key


class HomeIds:
    """The node id that each home gave this node, kept over restarts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._ids: dict[str, int] = {}
        if path.exists():
            try:
                held = json.loads(path.read_bytes())
                self._ids = {str(home): int(node_id) for home, node_id in held.items()}
            except (OSError, ValueError, TypeError, AttributeError):
                # Only a hint that saves waiting for an old lease to end: a damaged one is made anew.
                self._ids = {}

    def get(self, home: str) -> int | None:
        """Return the remembered node id, if any."""
        return self._ids.get(home)

    def set(self, home: str, node_id: int) -> None:
        """Remember a node id."""
        with self._lock:
            if self._ids.get(home) != node_id:
                self._ids[home] = node_id
                write_json(self._path, self._ids)


class ContextStates:
    """The `Context.state` of each run, in memory and on disk, for the newest runs only.

    Parameters
    ----------
    folder : Path
        Where the files go; Flower's own serialisation of a RecordDict, never pickle.
    keep : int
        How many runs to keep.
    """

    def __init__(self, folder: Path, keep: int = 4) -> None:
        self._folder = folder
        self._keep = keep
        self._lock = threading.Lock()
        self._held: OrderedDict[str, RecordDict] = OrderedDict()
        self._written: dict[str, bytes] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise StateError(f"cannot make {folder}: {fault.strerror}; choose another --state") from fault

    def _path(self, run: str) -> Path:
        # A run id comes from a server: never a part of a path.
        return self._folder / f"{hashlib.sha256(run.encode()).hexdigest()[:32]}.pb"

    def load(self, run: str) -> RecordDict:
        """Return a run's state; the same object every time, empty for a new run.

        Raises
        ------
        StateError
            If the file is damaged.
        """
        with self._lock:
            if run not in self._held:
                path = self._path(run)
                try:
                    content = path.read_bytes() if path.exists() else b""
                    self._held[run] = recorddict_from_proto(ProtoRecordDict.FromString(content))
                except (OSError, DecodeError, ValueError) as fault:
                    raise StateError(
                        f"the run state {path} is damaged ({fault}); delete it to start anew"
                    ) from fault
            self._held.move_to_end(run)
            while len(self._held) > self._keep:
                self._held.popitem(last=False)
            return self._held[run]

    def save(self, run: str, state: RecordDict) -> None:
        """Write a run's state, and delete the files of all but the newest runs."""
        path = self._path(run)
        with self._lock:
            self._held[run] = state
            self._held.move_to_end(run)
        if not state and not path.exists():
            return
        content = recorddict_to_proto(state).SerializeToString()
        digest = hashlib.sha256(content).digest()
        if self._written.get(run) == digest:
            return
        write_bytes(path, content)
        self._written = {run: digest}
        files = sorted(self._folder.glob("*.pb"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
        for old in files[self._keep :]:
            old.unlink(missing_ok=True)
