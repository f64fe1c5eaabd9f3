"""A node's state folder: its lock, key, node ids and app states."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from flwr.app import ConfigRecord, RecordDict

from espalier.errors import StateError
from espalier.flower.node_state import (
    ContextStates,
    NodeIds,
    load_key,
    load_or_make_key,
)


def test_a_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    key = load_or_make_key(tmp_path / "node.key")
    assert stat.S_IMODE((tmp_path / "node.key").stat().st_mode) == 0o600
    assert load_or_make_key(tmp_path / "node.key").private_numbers() == key.private_numbers()


def test_a_key_in_openssh_form(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    (tmp_path / "key").write_bytes(key.private_bytes(*form))
    assert load_key(tmp_path / "key").private_numbers() == key.private_numbers()


def test_keys_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot read the key"):
        load_key(tmp_path / "absent")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(StateError, match="not an unencrypted private key"):
        load_key(tmp_path / "text")
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "rsa").write_bytes(rsa.generate_private_key(65537, 1024).private_bytes(*form))
    with pytest.raises(StateError, match="not an elliptic-curve key"):
        load_key(tmp_path / "rsa")


def test_home_ids_outlive_the_process_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "homes.json"
    NodeIds(path).set("a:1", 2**63 + 5)
    assert NodeIds(path).get("a:1") == 2**63 + 5
    path.write_text("[1")
    assert NodeIds(path).get("a:1") is None


def test_run_states_are_restored_and_only_the_newest_kept(tmp_path: Path) -> None:
    states = ContextStates(tmp_path, keep=2)
    for run in ("one", "../two", "three"):
        state = states.load(run)
        assert states.load(run) is state
        state["c"] = ConfigRecord({"run": run})
        states.save(run, state)
    again = ContextStates(tmp_path, keep=2)
    assert again.load("one") == RecordDict()
    assert again.load("../two") == RecordDict({"c": ConfigRecord({"run": "../two"})})
    assert len(list(tmp_path.iterdir())) == 2


def test_an_empty_state_leaves_no_file(tmp_path: Path) -> None:
    states = ContextStates(tmp_path)
    states.save("run", states.load("run"))
    assert list(tmp_path.iterdir()) == []
    states.save("run", RecordDict({"c": ConfigRecord({"k": "v"})}))
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"\xff\xff\xff")
    with pytest.raises(StateError, match="damaged"):
        ContextStates(tmp_path).load("run")
