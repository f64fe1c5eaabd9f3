"""The registry of node keys: one key one name, shared by processes, damaged by nobody."""

from __future__ import annotations

import json
import stat
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.errors import ConfigError, EspalierError, StateError, WireError
from espalier.security.keys import KeyRegistry, canonical, openssh

KEYS = [ec.generate_private_key(ec.SECP256R1()).public_key() for _ in range(4)]
PEMS = [public_key_to_bytes(key) for key in KEYS]


@pytest.fixture
def registry(tmp_path: Path) -> KeyRegistry:
    return KeyRegistry(tmp_path / "state" / "clients.json")


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_both_forms_of_a_key_are_one(curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve).public_key()
    flowers = public_key_to_bytes(key)
    line = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    assert canonical(flowers, "a") == canonical(line + b" a comment\n", "a") == flowers
    assert openssh(flowers) == line + b"\n"


def test_what_is_no_key_is_refused(registry: KeyRegistry) -> None:
    other = ed25519.Ed25519PrivateKey.generate().public_key()
    for wrong in (
        b"",
        b"nonsense",
        PEMS[0][:60],
        other.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH),
        public_key_to_bytes(ec.generate_private_key(ec.SECP256K1()).public_key()),
    ):
        with pytest.raises(StateError, match="public key of 'cam'"):
            registry.add("cam", wrong)
    with pytest.raises(ConfigError, match=r"'\.\./x' is no name"):
        registry.add("../x", PEMS[0])
    assert registry.entries() == []


def test_one_key_one_name(registry: KeyRegistry) -> None:
    added = registry.add("cam-1", PEMS[0])
    assert registry.add("cam-1", openssh(PEMS[0])) == added
    with pytest.raises(ConfigError, match="registered as 'cam-1'"):
        registry.add("cam-2", PEMS[0])
    with pytest.raises(ConfigError, match="another key"):
        registry.add("cam-1", PEMS[1])
    assert registry.key("cam-1") == PEMS[0]
    assert registry.name_of(PEMS[0]) == "cam-1"
    assert registry.key("cam-2") is None
    assert registry.name_of(PEMS[1]) is None


def test_a_revoked_key_stays_revoked(registry: KeyRegistry) -> None:
    registry.add("cam", PEMS[0])
    assert registry.revoke("cam").revoked
    assert registry.key("cam") is None
    assert registry.name_of(PEMS[0]) is None
    for name in ("cam", "other"):
        with pytest.raises(ConfigError, match="was revoked"):
            registry.add(name, PEMS[0])
    with pytest.raises(ConfigError, match="no key in force"):
        registry.revoke("cam")
    registry.add("cam", PEMS[1])  # the device's next key
    assert registry.key("cam") == PEMS[1]
    assert [(e.public_key, e.revoked) for e in registry.entries()] == [(PEMS[1], False), (PEMS[0], True)]
    assert len(registry.forget("cam")) == 2
    assert registry.forget("cam") == []
    registry.add("other", PEMS[0])
    assert registry.name_of(PEMS[0]) == "other"


def test_a_claim_needs_the_names_own_key(registry: KeyRegistry) -> None:
    registry.add("cam-1", PEMS[0])
    registry.add("cam-2", PEMS[1])
    registry.claim("cam-1", PEMS[0])
    with pytest.raises(WireError, match=r"'cam-1' refused: its node key is registered as 'cam-2'"):
        registry.claim("cam-1", PEMS[1])
    with pytest.raises(WireError, match="not registered"):
        registry.claim("cam-1", PEMS[2])
    registry.revoke("cam-1")
    with pytest.raises(WireError, match="revoked"):
        registry.claim("cam-1", PEMS[0])


def test_another_process_is_seen(registry: KeyRegistry) -> None:
    other = KeyRegistry(registry.path)
    registry.add("cam", PEMS[0])
    assert other.key("cam") == PEMS[0]
    other.revoke("cam")
    assert registry.key("cam") is None
    registry.path.unlink()
    assert registry.entries() == []


def test_those_who_add_at_once_all_stay(registry: KeyRegistry) -> None:
    def add(number: int) -> None:
        KeyRegistry(registry.path).add(f"cam-{number}", PEMS[number])

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [e.name for e in registry.entries()] == ["cam-0", "cam-1", "cam-2", "cam-3"]


def test_the_file_is_private_and_damage_is_reported(registry: KeyRegistry) -> None:
    registry.add("cam", PEMS[0])
    assert stat.S_IMODE(registry.path.stat().st_mode) == 0o600
    (entry,) = json.loads(registry.path.read_text())
    for damage in ("{", "[1]", "[{}]", json.dumps([entry | {"revoked": "no"}]), "7"):
        registry.path.write_text(damage)
        with pytest.raises(StateError, match=r"clients\.json is damaged"):
            KeyRegistry(registry.path)
        with pytest.raises(StateError, match="damaged"):
            registry.key("cam")


ACTIONS = st.tuples(
    st.sampled_from(["add", "revoke", "forget"]), st.sampled_from(["a", "b", "c"]), st.integers(0, 3)
)


@settings(max_examples=50, deadline=None)
@given(st.lists(ACTIONS, max_size=12))
def test_whatever_is_done_a_key_has_one_name_and_a_name_one_key(actions: list[tuple[str, str, int]]) -> None:
    with TemporaryDirectory() as folder:
        registry = KeyRegistry(Path(folder) / "clients.json")
        revoked: dict[bytes, str] = {}
        for action, name, number in actions:
            try:
                if action == "add":
                    registry.add(name, PEMS[number])
                elif action == "revoke":
                    revoked[registry.revoke(name).public_key] = name
                else:
                    registry.forget(name)
                    revoked = {key: owner for key, owner in revoked.items() if owner != name}
            except EspalierError:
                pass
            entries = KeyRegistry(registry.path).entries()
            in_force = [e for e in entries if not e.revoked]
            assert len({e.public_key for e in entries}) == len(entries)
            assert len({e.name for e in in_force}) == len(in_force)
            assert {e.public_key: e.name for e in entries if e.revoked} == revoked
            for entry in in_force:
                assert registry.key(entry.name) == entry.public_key
                assert registry.name_of(entry.public_key) == entry.name
