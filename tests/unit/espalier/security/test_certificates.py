"""Certificates and node keys, and the commands that make them."""

from __future__ import annotations

import json
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from espalier import cli
from espalier.errors import ConfigError
from espalier.flower.node_state import load_key, load_or_make_key
from espalier.security.certificates import (
    Pair,
    check_served,
    check_server,
    facts,
    in_force,
    issue,
    new_authority,
    node_key_pair,
)
from espalier.security.keys import EDGE_KEYS, KeyRegistry, canonical, fingerprint, openssh
from espalier.security.name_registry import EDGE_NAMES, NameRegistry
from espalier.security.transport import Security

SECONDS = 1 / 86400


@pytest.fixture(scope="module")
def authority() -> Pair:
    return new_authority("ours", 10)


def test_a_server_certificate_says_what_it_is_for(authority: Pair) -> None:
    pair = issue(authority, ["edge.example", "*.lan", "10.0.0.2", "::1"], 5)
    (said,) = facts(pair.certificate, "it")
    assert (said.subject, said.issuer, said.authority) == ("edge.example", "ours", False)
    assert said.hosts == ("edge.example", "*.lan", "10.0.0.2", "::1")
    assert 4.9 < said.days_left <= 5
    for host in (None, "edge.example", "cam.lan", "10.0.0.2"):
        assert check_server(pair, "it", authority.certificate, host) == said
    for host in ("other.example", "a.b.lan", "lan", "10.0.0.3"):
        with pytest.raises(ConfigError, match="does not stand for"):
            check_server(pair, "it", host=host)
    assert (
        facts(issue(authority, ["a"], 1000).certificate, "it")[0].days_left <= 10
    )  # no longer than its authority


def test_openssl_agrees(authority: Pair, tmp_path: Path) -> None:
    """An implementation of its own (Python's ssl, OpenSSL) shakes hands with it, and only under its names."""
    pair = issue(authority, ["edge.example"], 5)
    for name, content in (("cert", pair.certificate), ("key", pair.private_key)):
        (tmp_path / name).write_bytes(content)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    client = ssl.create_default_context(cadata=authority.certificate.decode())
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    assert shake_hands(server, client, "edge.example") == ""
    assert "not valid for" in shake_hands(server, client, "other.example")
    other = ssl.create_default_context(cadata=new_authority("ours", 1).certificate.decode())
    assert "certificate verify failed" in shake_hands(server, other, "edge.example")


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> str:
    """Return what went wrong, nothing if all went well."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname=host)
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for end in (ours, theirs):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError as error:
                return str(error)
    return "" if ours.version() else "no handshake"


def test_faults_are_found_before_those_who_connect_find_them(authority: Pair, tmp_path: Path) -> None:
    pair, other = issue(authority, ["a"], 5), new_authority("ours", 5)
    with pytest.raises(ConfigError, match="do not belong together"):
        check_server(Pair(pair.certificate, other.private_key), "it")
    with pytest.raises(ConfigError, match=r"signed by none.*ca\.pem"):
        check_server(pair, "it", other.certificate)
    check_server(pair, "it", other.certificate + authority.certificate)  # while authorities change
    with pytest.raises(ConfigError, match="it expired on"):
        check_server(issue(authority, ["a"], -60 * SECONDS), "it")
    with pytest.raises(ConfigError, match="do not belong together"):
        issue(Pair(authority.certificate, other.private_key), ["a"], 1)
    with pytest.raises(ConfigError, match="certs init --renew"):
        issue(new_authority("old", -60 * SECONDS), ["a"], 1)
    for host in ("a b", "a:9092", "", "http://a", "*"):
        with pytest.raises(ConfigError, match="--host"):
            issue(authority, [host], 1)
    with pytest.raises(ConfigError, match="it holds no certificate"):
        facts(b"-----BEGIN CERTIFICATE-----\nxx\n-----END CERTIFICATE-----\n", "it")


def test_a_server_says_that_its_certificate_ends_soon(
    authority: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair = issue(authority, ["a"], 3)
    (tmp_path / "cert").write_bytes(pair.certificate)
    (tmp_path / "key").write_bytes(pair.private_key)
    security = Security(certificate=tmp_path / "cert", private_key=tmp_path / "key")
    check_served(security, "0.0.0.0:1")
    assert "expires in 3.0 days" in caplog.text
    with pytest.raises(ConfigError, match="does not stand for 127"):
        check_served(security, "0.0.0.0:1", host="127.0.0.1")
    check_served(Security(), "127.0.0.1:1")
    assert security.keys_only
    assert not Security().keys_only
    assert not Security(certificate=tmp_path / "cert", trust_on_first_use=True).keys_only


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


# --- commands --------------------------------------------------------------------------------------


class Espalier:
    """The command line in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, line: str, status: int = 0) -> str:
        self._monkeypatch.setattr(sys, "argv", ["espalier", *line.split()])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = self._capsys.readouterr()
        assert ended.value.code == status, said
        return said.err if status else said.out


@pytest.fixture
def espalier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Espalier:
    monkeypatch.chdir(tmp_path)
    return Espalier(monkeypatch, capsys)


def pair_in(folder: Path) -> Pair:
    return Pair((folder / "server.pem").read_bytes(), (folder / "server.key").read_bytes())


def test_certificates_for_three_machines(espalier: Espalier, tmp_path: Path) -> None:
    espalier("certs init")
    espalier("certs cloud --host cloud.example")
    said = espalier("certs edge --name edge-1 --host edge.example --host 10.0.0.3")
    assert "espalier edges add edge-1 certs/edge-1/node.pub" in said
    said = espalier("certs client --name cam-7 --out elsewhere")
    assert "espalier clients add cam-7 elsewhere/node.pub" in said
    certs = tmp_path / "certs"
    roots = (certs / "ca.pem").read_bytes()
    for folder in (certs / "cloud", certs / "edge-1", tmp_path / "elsewhere"):
        assert (folder / "ca.pem").read_bytes() == roots
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for host in ("edge.example", "10.0.0.3", "localhost", "127.0.0.1"):
        check_server(pair_in(certs / "edge-1"), "it", roots, host)
    secret = [certs / "ca.key", *certs.glob("*/*.key"), tmp_path / "elsewhere" / "node.key"]
    assert len(secret) == 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in secret} == {0o600}
    shown = json.loads(espalier("certs show --format json"))
    assert {row["subject"] for row in shown} == {"Espalier", "cloud.example", "edge.example"}
    assert "edge.example, for edge.example, 10.0.0.3, localhost" in espalier("certs show")


def test_nothing_is_overwritten_unasked_and_the_old_stays(espalier: Espalier, tmp_path: Path) -> None:
    espalier("certs init")
    espalier("certs edge --name e --host edge.example")
    espalier("certs client --name c")
    folder = tmp_path / "certs" / "e"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "--renew" in espalier("certs init", 2)
    assert "--renew" in espalier("certs edge --name e --host edge.example", 2)
    assert "--renew-key" in espalier("certs client --name c", 2)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    espalier("certs edge --name e --renew --days 7")  # the hosts stay
    check_server(pair_in(folder), "it", host="edge.example")
    assert (folder / "server.pem").read_bytes() != before["server.pem"]
    assert (folder / "node.key").read_bytes() == before["node.key"]
    (old,) = folder.glob("server.key.until-*")
    assert old.read_bytes() == before["server.key"]
    assert stat.S_IMODE(old.stat().st_mode) == 0o600
    espalier("certs edge --name e --renew-key")
    assert (folder / "node.pub").read_bytes() != before["node.pub"]


def test_an_authority_is_replaced_in_two_steps(espalier: Espalier, tmp_path: Path) -> None:
    espalier("certs init")
    espalier("certs cloud --host c")
    certs = tmp_path / "certs"
    old = pair_in(certs / "cloud")
    espalier("certs init --renew")
    both = (certs / "ca.pem").read_bytes()
    espalier("certs cloud --renew")
    for pair in (old, pair_in(certs / "cloud")):
        check_server(pair, "it", both)
    espalier("certs init --retire")
    alone = (certs / "ca.pem").read_bytes()
    check_server(pair_in(certs / "cloud"), "it", alone)
    with pytest.raises(ConfigError, match="signed by none"):
        check_server(old, "it", alone)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("certs cloud --host c", "certs init --dir certs"),
        ("certs client --name ../x", "--name '../x'"),
        ("certs show", "cannot read certs"),
        ("clients add c absent.pub --state s", "cannot read absent.pub"),
        ("clients revoke c --state s", "no key in force"),
        ("edges list --state s --format xml", "'xml'"),
    ],
)
def test_mistakes(espalier: Espalier, line: str, part: str) -> None:
    assert part in espalier(line, 2)


def test_members_are_added_revoked_and_forgotten(espalier: Espalier, tmp_path: Path) -> None:
    for name in ("e1", "c1"):
        espalier(f"certs client --name {name}")
    assert "no key in" in espalier("edges list --state s")
    espalier("edges add e1 certs/e1/node.pub --state s")
    assert "different keys" in espalier("clients add e1 certs/e1/node.pub --state s", 2)
    assert "private key" in espalier("clients add c1 certs/c1/node.key --state s", 2)
    espalier("clients add c1 certs/c1/node.pub --state s")
    (row,) = json.loads(espalier("edges list --state s --format json"))
    key = (tmp_path / "certs/e1/node.pub").read_bytes()
    assert (row["name"], row["revoked"]) == ("e1", False)
    assert row["public_key"] == key.decode().strip()
    assert row["fingerprint"] in espalier("edges list --state s")
    espalier("edges revoke e1 --state s")
    assert "REVOKED" in espalier("edges list --state s")
    assert KeyRegistry(tmp_path / "s" / EDGE_KEYS).key("e1") is None

    NameRegistry(tmp_path / "s" / EDGE_NAMES).claim("e1", canonical(key, "e1"))
    for run, edge in (("one", "e1"), ("two", "e12")):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "report.json").write_text(json.dumps({"edges": {edge: {}}}))
    said = espalier("edges forget e1 --state s --runs runs")
    assert "its key in edge-keys.json and its name in edges.json" in said
    assert "runs/one name e1" in said
    assert "runs/two" not in said
    assert "nothing to delete" in espalier("edges forget e1 --state s")
    NameRegistry(tmp_path / "s" / EDGE_NAMES).claim("e1", b"another key")
