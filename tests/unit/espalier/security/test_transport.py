"""Addresses, and which links may be plain."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.errors import AddressError, ConfigError
from espalier.security.transport import Security, parse_address

IPS = ["::1:9092", "[::1]", "[host]:1", "1.2.3:4", "999.1.1.1:80", "http://host:80", "host:80/x", "-x:1"]
PEM = "-----BEGIN CERTIFICATE-----\n"


@pytest.mark.parametrize(
    ("text", "host", "port", "loopback"),
    [
        ("127.0.0.1:9092", "127.0.0.1", 9092, True),
        ("127.8.0.1:1", "127.8.0.1", 1, True),
        ("localhost:65535", "localhost", 65535, True),
        ("[::1]:9092", "::1", 9092, True),
        ("0.0.0.0:9092", "0.0.0.0", 9092, False),
        ("[::]:9092", "::", 9092, False),
        ("192.0.2.7:80", "192.0.2.7", 80, False),
        ("edge-1.example.org:9093", "edge-1.example.org", 9093, False),
        (" cloud:9092 ", "cloud", 9092, False),
    ],
)
def test_addresses(text: str, host: str, port: int, loopback: bool) -> None:
    address = parse_address(text)
    assert (address.host, address.port, address.is_loopback) == (host, port, loopback)
    assert str(address) == text.strip()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "9092",
        "host",
        "host:",
        ":9092",
        "host:x",
        "host:0",
        "host:65536",
        "host:-1",
        "host:\uff19\uff10",
        "a b:1",
        *IPS,
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse_address(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        address = parse_address(text)
    except AddressError:
        return
    assert parse_address(str(address)) == address


def test_port_zero_is_for_listening() -> None:
    assert parse_address("127.0.0.1:0", listen=True).port == 0
    with pytest.raises(AddressError):
        parse_address("127.0.0.1:0")


def test_plain_links_stay_on_this_machine_unless_allowed() -> None:
    plain = Security()
    assert plain.client_roots("127.0.0.1:1") is None
    assert plain.server_certificates("localhost:1") is None
    with pytest.raises(ConfigError, match=r"--root-certificates FILE.*--insecure"):
        plain.client_roots("192.0.2.7:9092")
    with pytest.raises(ConfigError, match=r"--certificate FILE and --private-key FILE.*--insecure"):
        plain.server_certificates("0.0.0.0:9092")
    allowed = Security(insecure=True)
    assert allowed.client_roots("192.0.2.7:9092") is None
    assert allowed.server_certificates("0.0.0.0:9092") is None


def test_certificates_are_read(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("ca", "cert", "key")}
    for name, path in files.items():
        path.write_text(PEM + name)
    security = Security(files["ca"], files["cert"], files["key"])
    assert security.client_roots("192.0.2.7:9092") == (PEM + "ca").encode()
    expected = tuple((PEM + name).encode() for name in ("ca", "cert", "key"))
    assert security.server_certificates("0.0.0.0:9092") == expected
    alone = Security(certificate=files["cert"], private_key=files["key"])
    assert alone.server_certificates("0.0.0.0:9092") == (expected[1], expected[1], expected[2])


def test_certificate_faults_name_flag_and_file(tmp_path: Path) -> None:
    cert = tmp_path / "cert.pem"
    cert.write_text(PEM)
    with pytest.raises(ConfigError, match="--private-key FILE is missing"):
        Security(certificate=cert).server_certificates("127.0.0.1:1")
    with pytest.raises(ConfigError, match="--certificate FILE is missing"):
        Security(private_key=cert).server_certificates("127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"--root-certificates .*absent\.pem cannot be read"):
        Security(root_certificates=tmp_path / "absent.pem").client_roots("127.0.0.1:1")
    cert.write_text("not a certificate")
    with pytest.raises(ConfigError, match="not a PEM file"):
        Security(root_certificates=cert).client_roots("127.0.0.1:1")


def test_flags_stand_for_it(tmp_path: Path) -> None:
    assert Security().flags() == []
    flags = Security(root_certificates=tmp_path / "ca", insecure=True).flags()
    assert flags == ["--root-certificates", str(tmp_path / "ca"), "--insecure"]
