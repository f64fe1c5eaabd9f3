"""The authority refuses to sign with what does not fit, and makes node keys that Flower reads."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from espalier.errors import ConfigError
from espalier.flower.node_state import load_key, load_or_make_key
from espalier.security.certificates import Pair
from espalier.security.keys import canonical, fingerprint, openssh
from espalier_server.certificate_authority import in_force, issue, new_authority, node_key_pair

SECONDS = 1 / 86400


def test_certificates_are_issued_only_by_a_valid_authority_for_valid_hosts() -> None:
    authority, other = new_authority("ours", 10), new_authority("ours", 5)
    with pytest.raises(ConfigError, match="do not belong together"):
        issue(Pair(authority.certificate, other.private_key), ["a"], 1)
    with pytest.raises(ConfigError, match="certs init --renew"):
        issue(new_authority("old", -60 * SECONDS), ["a"], 1)
    for host in ("a b", "a:9092", "", "http://a", "*"):
        with pytest.raises(ConfigError, match="--host"):
            issue(authority, [host], 1)


def test_expired_authorities_leave_the_bundle() -> None:
    old, new = new_authority("old", -60 * SECONDS), new_authority("new", 1)
    assert in_force(new.certificate + old.certificate, "ca.pem") == [new.certificate]


def test_node_keys_are_what_both_ends_read(tmp_path: Path) -> None:
    private, public = node_key_pair()
    (tmp_path / "node.key").write_bytes(private)
    key = load_key(tmp_path / "node.key")
    stock = load_ssh_private_key(private, password=None)  # as flower-supernode does
    assert canonical(public, "a") == canonical(openssh(canonical(public, "a")), "a")
    assert load_or_make_key(tmp_path / "node.key").public_key() == key.public_key() == stock.public_key()
    assert (tmp_path / "node.pub").read_bytes() == public
    tool = ["ssh-keygen", "-lf", str(tmp_path / "node.pub")]
    if (said := subprocess.run(tool, capture_output=True, text=True, check=False)).returncode == 0:
        assert fingerprint(canonical(public, "a")) in said.stdout
