"""A user's ClientApp: its modules may have any names that are not ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from espalier.errors import ConfigError
from espalier_client.service import load_app

CLIENT = """
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

import common
import proto
import server
import utils

app = ClientApp()
WORDS = [common.WORD, proto.WORD, server.WORD, utils.WORD]
no_app = 3
"""

PROGRAM = """
import sys
from espalier_client.service import load_app

app = load_app("client:app")
import client
import espalier_client.app, espalier_server.app, espalier_edge.service, espalier_proto.espalier_pb2
print(client.__file__, *client.WORDS, type(app).__name__)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "client.py").write_text(CLIENT)
    for name in ("common", "server", "utils"):
        (tmp_path / f"{name}.py").write_text(f"WORD = {name!r}\n")
    (tmp_path / "proto").mkdir()
    (tmp_path / "proto" / "__init__.py").write_text("WORD = 'proto'\n")
    return tmp_path


@pytest.mark.parametrize("flags", [["-P"], []], ids=["safe path", "plain"])
def test_apps_may_use_module_names_of_flowers_templates(folder: Path, flags: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *flags, "-c", PROGRAM], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(folder / "client.py"),
        "common",
        "proto",
        "server",
        "utils",
        "ClientApp",
    ]


@pytest.mark.parametrize(
    ("reference", "fault"),
    [
        ("client", "not of the form module:object"),
        ("no_such_module:app", "cannot be imported"),
        ("json:app", "has no 'app'"),
        ("json:loads", "is a function, not a flwr ClientApp"),
    ],
)
def test_what_is_no_app_is_refused(reference: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ConfigError, match=fault):
        load_app(reference)
