"""Admission by key: the SuperLink's nodes match the registry, and refusals are logged."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from espalier.errors import AddressError
from espalier.security.keys import EDGE_KEYS, KeyRegistry, fingerprint
from espalier.security.refusals import AGAIN_SECONDS, Refusals
from espalier_server.superlink.clouds import Cloud
from espalier_server.superlink.edge_admission import EdgeAdmission

PEMS = [public_key_to_bytes(ec.generate_private_key(ec.SECP256R1()).public_key()) for _ in range(3)]


class Flower:
    """The SuperLink behind its Control API."""

    def __init__(self) -> None:
        self.nodes: dict[int, tuple[str, bytes]] = {}
        self.count = 0
        self.down = False

    def register(self, control: str, roots: str, public_key: bytes, name: str) -> int:
        if self.down:
            raise AddressError("no answer")
        assert (control, roots) == ("127.0.0.1:2", "ca.pem")
        self.count += 1
        self.nodes[self.count] = (name, public_key)
        return self.count

    def unregister(self, control: str, roots: str, node_id: int) -> None:
        del self.nodes[node_id]

    def admitted(self) -> dict[str, bytes]:
        return dict(self.nodes.values())


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> Flower:
    flower = Flower()
    monkeypatch.setattr("espalier_server.superlink.edge_admission.register_node", flower.register)
    monkeypatch.setattr("espalier_server.superlink.edge_admission.unregister_node", flower.unregister)
    return flower


@pytest.fixture
def registry(tmp_path: Path) -> KeyRegistry:
    return KeyRegistry(tmp_path / EDGE_KEYS)


@pytest.fixture
def admission(tmp_path: Path, registry: KeyRegistry) -> EdgeAdmission:
    return EdgeAdmission(Cloud("c", "127.0.0.1:1", "127.0.0.1:2", 1, str(tmp_path), "ca.pem"), registry)


def test_the_superlink_follows_the_registry(
    flower: Flower, registry: KeyRegistry, admission: EdgeAdmission
) -> None:
    registry.add("a", PEMS[0])
    registry.add("b", PEMS[1])
    admission.register_all()
    assert flower.admitted() == {"a": PEMS[0], "b": PEMS[1]}
    other = KeyRegistry(registry.path)
    other.revoke("a")
    other.add("c", PEMS[2])
    admission.update()
    assert flower.admitted() == {"b": PEMS[1], "c": PEMS[2]}
    other.forget("b")
    other.add("d", PEMS[1])
    admission.update()
    assert flower.admitted() == {"c": PEMS[2], "d": PEMS[1]}
    flower.nodes.clear()  # the SuperLink was killed
    admission.register_all()
    assert set(flower.admitted()) == {"c", "d"}
    calls = flower.count
    admission.update()
    assert flower.count == calls


def test_a_failed_registration_is_retried(
    flower: Flower,
    registry: KeyRegistry,
    admission: EdgeAdmission,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 1000.0
    monkeypatch.setattr("espalier_server.superlink.edge_admission.time.monotonic", lambda: now)
    registry.add("a", PEMS[0])
    flower.down = True
    admission.register_all()
    assert "edge a: no answer; retrying in 30 s" in caplog.text
    flower.down = False
    admission.update()
    assert flower.admitted() == {}
    now += 31
    admission.update()
    assert set(flower.admitted()) == {"a"}


def test_a_damaged_registry_changes_nothing(
    flower: Flower, registry: KeyRegistry, admission: EdgeAdmission, caplog: pytest.LogCaptureFixture
) -> None:
    registry.add("a", PEMS[0])
    admission.register_all()
    registry.path.write_text("{")
    for _ in range(3):
        admission.update()
    assert set(flower.admitted()) == {"a"}
    assert caplog.text.count("is damaged") == 1


def test_the_superlinks_refusals_are_logged(
    flower: Flower, registry: KeyRegistry, admission: EdgeAdmission, caplog: pytest.LogCaptureFixture
) -> None:
    log = registry.path.with_name("superlink.log")
    log.write_text("of the SuperLink before\n")
    admission.register_all()
    line = (
        "ERROR :     [/flwr.proto.Fleet/ActivateNode][ApiError:2004] Attempted to register SuperNode with public "
        f"key: {PEMS[0]!r}, exception: No SuperNode found with the given public key.\n"
    )
    with log.open("a") as file:
        file.write(line[:80])
        file.flush()
        admission.update()
        assert "refused" not in caplog.text
        file.write(line[80:] + line)
        file.flush()
    admission.update()
    admission.update()
    assert caplog.text.count("refused a node") == 1
    assert fingerprint(PEMS[0]) in caplog.text
    assert f"espalier edges add NAME KEY.pub --state {registry.path.parent}" in caplog.text


def test_a_refused_node_is_told_once_in_a_while(
    registry: KeyRegistry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr("espalier.security.refusals.time.monotonic", lambda: now)
    tell = Refusals(registry, "espalier clients add", logging.getLogger("espalier.test"))
    for _ in range(3):
        tell(PEMS[0], "ipv4:192.0.2.7:1")
    tell(PEMS[1], "ipv4:192.0.2.8:1")
    assert [r.getMessage().count("192.0.2.7") for r in caplog.records] == [1, 0]
    now += AGAIN_SECONDS
    tell(PEMS[0], "ipv4:192.0.2.9:1")
    assert "192.0.2.9" in caplog.records[-1].getMessage()
    registry.add("cam", PEMS[0])
    registry.revoke("cam")
    tell(PEMS[0], "")
    assert "cam's, which was revoked" in caplog.records[-1].getMessage()
    tell(b"nonsense\nof a stranger", "ipv4:192.0.2.10:1")
    assert "refused a node at ipv4:192.0.2.10:1" in caplog.records[-1].getMessage()
    assert len(caplog.records) == 5
