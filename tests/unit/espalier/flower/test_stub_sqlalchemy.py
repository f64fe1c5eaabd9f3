"""A process of ours loads no database, one that has loaded one keeps it, and Flower's own processes are not touched."""

from __future__ import annotations

import subprocess
import sys

import pytest

from espalier.flower.stub_sqlalchemy import NEED_SQL


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_an_edge_loads_no_database_and_says_so_if_one_is_wanted() -> None:
    said = python(
        "import sys, espalier_edge.fleet.server, espalier_edge.app\n"
        "from flwr.server.superlink.linkstate import SqlLinkState\n"
        "print([name for name in ('sqlalchemy', 'alembic', 'mako') if name in sys.modules])\n"
        "try:\n    SqlLinkState('x', None, None)\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    assert said.splitlines()[0] == "[]"
    assert "SqlLinkState is a stub" in said


def test_where_a_database_is_loaded_flower_has_it() -> None:
    said = python(
        "import sqlalchemy, espalier_edge.fleet.server\n"
        "from flwr.server.superlink.linkstate import SqlLinkState\n"
        "print(SqlLinkState.__mro__[1].__name__)\n"
    )
    assert said.strip() != "object"


@pytest.mark.parametrize(("module", "held"), NEED_SQL.items())
def test_flower_has_what_is_left_out(module: str, held: str) -> None:
    """The contract: the modules are Flower's, and each holds the class that its others import."""
    said = python(
        f"import sqlalchemy, {module} as m; print(hasattr(m, {held!r}), m.__file__.endswith('.py'))"
    )
    assert said.split() == ["True", "True"]
