"""Server certificates are checked before a server presents them."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from espalier.errors import ConfigError
from espalier.security.certificates import Pair, check_served, check_server, facts
from espalier.security.transport import Security
from espalier_server.certificate_authority import issue, new_authority

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
        with pytest.raises(ConfigError, match="is not valid for"):
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
    with pytest.raises(ConfigError, match="is not valid for 127"):
        check_served(security, "0.0.0.0:1", host="127.0.0.1")
    check_served(Security(), "127.0.0.1:1")
    assert security.keys_only
    assert not Security().keys_only
    assert not Security(certificate=tmp_path / "cert", trust_on_first_use=True).keys_only
