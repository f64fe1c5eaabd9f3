"""The state of a resident node on disk: its key, its node id at each server, and the state of its runs."""

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
    """Read a node key: an unencrypted EC private key in PEM or OpenSSH format.

    Raises
    ------
    StateError
        If the file cannot be read or has no such key.
    """
    try:
        content = path.read_bytes()
    except OSError as fault:
        raise StateError(f"cannot read the key {path}: {fault.strerror}") from fault
    load = load_ssh_private_key if b"OPENSSH" in content[:60] else load_pem_private_key
    try:
        key = load(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as fault:
        raise StateError(f"{path} is not an unencrypted private key: {fault}") from fault
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StateError(
            f"{path} is not an elliptic-curve key; make one with: ssh-keygen -t ecdsa -b 384 -N '' -f FILE"
        )
    return key


def load_or_make_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read the node key; generate one, readable by its owner only, if there is none.

    The public key, which servers register, is written to the same folder: NAME.pub for NAME.key.
    """
    if path.exists():
        key = load_key(path)
    else:
        # P-256: every call is signed and verified, and OpenSSL is ten times faster with it than with P-384.
        key = ec.generate_private_key(ec.SECP256R1())
        write_bytes(path, private_key_to_bytes(key), mode=0o600)
    if not path.with_suffix(".pub").exists():
        line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        write_bytes(path.with_suffix(".pub"), line + b"\n")
    return key


class NodeIds:
    """The node id that each server assigned to this node, stored across restarts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._ids: dict[str, int] = {}
        if path.exists():
            try:
                stored = json.loads(path.read_bytes())
                self._ids = {str(upstream): int(node_id) for upstream, node_id in stored.items()}
            except (OSError, ValueError, TypeError, AttributeError):
                # A hint that avoids waiting for an old lease to expire; a damaged file is replaced.
                self._ids = {}

    def get(self, upstream: str) -> int | None:
        """Return the stored node id, if any."""
        return self._ids.get(upstream)

    def set(self, upstream: str, node_id: int) -> None:
        """Store a node id."""
        with self._lock:
            if self._ids.get(upstream) != node_id:
                self._ids[upstream] = node_id
                write_json(self._path, self._ids)


class ContextStates:
    """The ``Context.state`` of the most recent runs, in memory and on disk.

    Parameters
    ----------
    folder : Path
        Folder of the files, which hold RecordDicts in Flower's protobuf format.
    keep : int
        Number of runs whose state is stored.
    """

    def __init__(self, folder: Path, keep: int = 4) -> None:
        self._folder = folder
        self._keep = keep
        self._lock = threading.Lock()
        self._cached: OrderedDict[str, RecordDict] = OrderedDict()
        self._written: dict[str, bytes] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise StateError(f"cannot create {folder}: {fault.strerror}; choose another --state") from fault

    def _path(self, run: str) -> Path:
        # A run id comes from a server, so it must not be part of a path.
        return self._folder / f"{hashlib.sha256(run.encode()).hexdigest()[:32]}.pb"

    def load(self, run: str) -> RecordDict:
        """Return the state of a run: the same object on every call, empty for a new run.

        Raises
        ------
        StateError
            If the file is damaged.
        """
        with self._lock:
            if run not in self._cached:
                path = self._path(run)
                try:
                    content = path.read_bytes() if path.exists() else b""
                    self._cached[run] = recorddict_from_proto(ProtoRecordDict.FromString(content))
                except (OSError, DecodeError, ValueError) as fault:
                    raise StateError(
                        f"the run state {path} is damaged ({fault}); delete it to start over"
                    ) from fault
            self._cached.move_to_end(run)
            while len(self._cached) > self._keep:
                self._cached.popitem(last=False)
            return self._cached[run]

    def save(self, run: str, state: RecordDict) -> None:
        """Write the state of a run, and delete the files of all but the most recent runs."""
        path = self._path(run)
        with self._lock:
            self._cached[run] = state
            self._cached.move_to_end(run)
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
