"""The commands that make certificates and node keys, and those that register the keys."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest

from espalier import cli
from espalier.errors import ConfigError
from espalier.security.certificates import Pair, check_server
from espalier.security.keys import EDGE_KEYS, KeyRegistry, canonical
from espalier.security.name_registry import EDGE_NAMES, NameRegistry


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
