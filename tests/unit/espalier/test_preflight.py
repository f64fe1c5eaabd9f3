"""Preflight: every prepared fault is found with its remedy, and a correct installation passes."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from typer.testing import CliRunner

from espalier.cli import command_line
from espalier.flower.node_state import load_or_make_key
from espalier.monitor import health
from espalier.preflight import machine
from espalier.preflight.findings import Finding, Findings
from espalier.preflight.network import _compare
from espalier.preflight.tls import check_own, check_server_link
from espalier.security.transport import Security, parse_address
from espalier.storage.lock import FolderLock
from espalier_edge.fleet.server import InlineFleet
from espalier_server.preflight import NEEDS
from tests.support.certificates import Authority
from tests.support.processes import free_port


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@contextmanager
def edge(security: Security, *, keys: list[ec.EllipticCurvePublicKey] | None = None) -> Iterator[str]:
    """Serve as an edge does; with `keys`, for these nodes only."""
    certificates = security.server_certificates("127.0.0.1:0")
    fleet = InlineFleet("127.0.0.1:0", certificates=certificates, require_keys=keys is not None)
    fleet.start()
    for key in keys or ():
        fleet.register_key(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), "node")
    yield f"127.0.0.1:{fleet.port}"
    fleet.stop(0)


def of(found: Findings, check: str) -> Finding:
    return next(f for f in found.all if f.check.startswith(check))


def own(authority: Authority, certificate: Path, key: Path, listen: str = "127.0.0.1:1") -> Findings:
    found = Findings()
    check_own(found, Security(authority.roots, certificate, key), parse_address(listen))
    return found


def test_a_sound_certificate(authority: Authority) -> None:
    found = own(authority, *authority.issue("edge"))
    assert {f.level for f in found.all} == {"ok"}
    names = ["certificate", "certificate dates", "private key", "certificate names"]
    assert [f.check for f in found.all] == names


def test_faults_of_a_certificate(authority: Authority) -> None:
    certificate, key = authority.issue("edge")
    _, other = authority.issue("other")
    stranger = Authority(authority.folder, "stranger")
    broken = authority.folder / "broken.key"
    broken.write_text("-----BEGIN nothing-----\n")
    for faulty, said in (
        (own(authority, certificate, other), "do not belong together"),
        (own(stranger, certificate, key), "signed by none of the authorities"),
        (own(authority, *authority.issue("old", days=-0.001)), "expired on"),
        (own(authority, certificate, broken), "not an unencrypted private key"),
        (own(authority, authority.folder / "absent", key), "cannot be read"),
    ):
        [finding] = faulty.all
        assert (finding.check, finding.level) == ("certificate", "fail")
        assert said in finding.said
        assert finding.mend


def test_what_is_warned_of_in_a_certificate(authority: Authority) -> None:
    certificate, key = authority.issue("edge", days=9.4)
    found = own(authority, certificate, key, "192.0.2.7:9093")
    assert of(found, "certificate dates").level == "warn"
    assert of(found, "certificate dates").said.startswith("expires in 9 days")
    assert of(found, "certificate names").level == "warn"
    assert of(found, "certificate names").said == "it is for 127.0.0.1, localhost, this host is 192.0.2.7"
    key.chmod(0o644)
    readable = of(own(authority, certificate, key), "private key")
    assert (readable.level, readable.mend) == ("warn", f"chmod 600 {key}")


def test_plain_links(authority: Authority) -> None:
    for address, insecure, level in (
        ("127.0.0.1:1", False, "ok"),
        ("0.0.0.0:1", True, "warn"),
        ("0.0.0.0:1", False, "fail"),
    ):
        found = Findings()
        check_own(found, Security(insecure=insecure), parse_address(address))
        assert of(found, "TLS").level == level


# --- the server above ------------------------------------------------------------------------------


def above(address: str, roots: Path | None) -> Findings:
    found = Findings()
    check_server_link(found, Security(root_certificates=roots), parse_address(address))
    return found


def test_the_servers_certificate_holds_or_says_why_not(authority: Authority) -> None:
    stranger = Authority(authority.folder, "stranger")
    with edge(Security(authority.roots, *authority.issue("edge"))) as address:
        assert {f.level for f in above(address, authority.roots).all} == {"ok"}
        unknown = of(above(address, stranger.roots), "TLS")
        assert unknown.mend == "give the authority that issued it with --root-certificates"
    with edge(Security(authority.roots, *authority.issue("old", days=-0.001))) as address:
        assert "renew the server's certificate" in of(above(address, authority.roots), "TLS").mend
    with edge(Security(authority.roots, *authority.issue("other", hosts=("other.example",)))) as address:
        assert "by a name of the certificate" in of(above(address, authority.roots), "TLS").mend
    with edge(Security()) as address:
        assert "check that the server uses TLS" in of(above(address, authority.roots), "TLS").mend


def test_nobody_above() -> None:
    address = f"127.0.0.1:{free_port()}"
    finding = of(above(address, None), f"reach {address}")
    assert (finding.level, "no connection" in finding.said) == ("fail", True)
    assert of(above("no-such-host.invalid:1", None), "name no-such-host.invalid").level == "fail"


def test_versions_and_clocks_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    with edge(Security()) as address:
        found = Findings()
        _compare(found, address, Security())
        assert {f.level for f in found.all} == {"ok"}
        facts = health.ask_facts(address, Security())
        assert facts is not None
        assert abs(facts.ahead) < 5
    odd = health.ServerFacts({"espalier": "9.8.7", "flwr": "1.39.0"}, 400.0)
    monkeypatch.setattr(health, "ask_facts", lambda *_: odd)
    found = Findings()
    _compare(found, "e:1", Security())
    assert of(found, "versions").said.startswith("espalier 9.8.7 there, ")
    clock = of(found, "clock")
    assert (clock.level, clock.said) == ("warn", "this machine's is 400.0 s ahead of the server's")


# --- the whole command -----------------------------------------------------------------------------


def preflight(*arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    done = CliRunner().invoke(command_line(), ["preflight", *arguments, "--format", "json"])
    found = json.loads(done.stdout)
    assert found["ok"] is (done.exit_code == 0)
    return done.exit_code, {check["check"]: check for check in found["checks"]}


def test_a_client_and_its_admission(tmp_path: Path, authority: Authority) -> None:
    state = tmp_path / "state"
    state.mkdir()
    key = load_or_make_key(state / "node.key").public_key()
    client = ["client", "--name", "c", "--data", "digits:0/4", "--state", str(state), "--root-certificates"]
    security = Security(authority.roots, *authority.issue("edge"))
    with edge(security, keys=[key]) as address:
        status, found = preflight(*client, str(authority.roots), "--edge", address)
        assert status == 0, found
        assert found["data"]["said"] == "360 images of 1x8x8 in 10 of 10 classes"
        assert found[f"admission {address}"]["level"] == "ok"
        # It left again: a second look is admitted, too. Beside a running client nothing is tried.
        assert preflight(*client, str(authority.roots), "--edge", address)[0] == 0
        lock = FolderLock(state)
        _, found = preflight(*client, str(authority.roots), "--edge", address)
        lock.release()
        assert found["state"]["level"] == "warn"
        assert "not tried" in found[f"admission {address}"]["said"]
    with edge(security, keys=[]) as address:
        status, found = preflight(*client, str(authority.roots), "--edge", address)
        assert status == 1
        assert "not registered" in found[f"admission {address}"]["said"]


def test_faults_of_a_client(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("nothing")
    faults = ["--data", "digits:9/4", "--device", "cuda:77", "--key", str(key), "--edge", "192.0.2.1:1"]
    status, found = preflight("client", "--name", "a b", "--state", "/proc/x", *faults)
    assert status == 1
    assert {name for name, check in found.items() if check["level"] == "fail"} == {
        "name",
        "state",
        "disk",  # /proc has none
        "device",
        "data",
        "node key",
        "--edge",
    }
    assert all(check["mend"] for check in found.values() if check["level"] != "ok")


def test_a_port_in_use_and_an_open_control_port(tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        taken = f"127.0.0.1:{held.getsockname()[1]}"
        more = ["--control", "0.0.0.0:8000", "--metrics-port", str(held.getsockname()[1])]
        status, found = preflight("cloud", "--state", str(tmp_path), "--listen", taken, *more)
    assert status == 1
    assert f"{taken} is in use" in found["--listen"]["said"]
    assert "is in use" in found["--metrics-port"]["said"]
    assert [c["level"] for c in found.values()].count("fail") == 3


def test_an_edge_as_text(tmp_path: Path) -> None:
    arguments = ["--cloud", f"127.0.0.1:{free_port()}", "--listen", f"127.0.0.1:{free_port()}"]
    done = CliRunner().invoke(
        command_line(),
        ["preflight", "edge", "--name", "e", "--state", str(tmp_path), *arguments],
        env={"COLUMNS": "80"},
    )
    assert done.exit_code == 1
    assert "→ start it, or check the address and the firewall" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_disk_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = []
    for free in (1e6, 1e9, 1e12):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: Free(free))
        monkeypatch.setattr(machine, "available_memory", lambda free=free: int(free))
        found = Findings()
        machine.check_space(found, NEEDS, tmp_path / "not" / "made")
        levels.append([f.level for f in found.all])
    assert levels == [["fail", "fail"], ["warn", "warn"], ["ok", "ok"]]


class Free:
    """What `shutil.disk_usage` returns, as far as it is read."""

    def __init__(self, free: float) -> None:
        self.free = free


def test_every_option_of_a_tier_is_taken() -> None:
    """The same command line, one word more."""
    for tier in ("cloud", "edge", "client"):
        own_help = CliRunner().invoke(command_line(), [tier, "--help"]).stdout
        options = {word for word in own_help.split() if word.startswith("--")}
        assert options <= set(
            CliRunner().invoke(command_line(), ["preflight", tier, "--help"]).stdout.split()
        )
