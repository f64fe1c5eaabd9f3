"""Replaces Flower's database modules with stubs, so that importing Flower does not import SQLAlchemy.

Importing Flower's in-memory link state also imports the one in a database, with SQLAlchemy and Alembic, which are a
fifth of the modules that an edge would load. The three modules that need a database are replaced with stubs whose
classes raise an error when they are instantiated. If SQLAlchemy is imported already, nothing is replaced.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, NoReturn

#: Flower's modules that need a database, and the class that other modules import from each.
NEED_SQL = {
    "flwr.supercore.object_store.sql_object_store": "SqlObjectStore",
    "flwr.supercore.corestate.sql_corestate": "SqlCoreState",
    "flwr.server.superlink.linkstate.sql_linkstate": "SqlLinkState",
}


def _refuse(self: object, *_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(
        f"{type(self).__name__} is a stub: this process stores its state in memory, without a database"
    )


def install_stubs() -> bool:
    """Install the stubs; return whether they were needed."""
    if "sqlalchemy" in sys.modules or any(name in sys.modules for name in NEED_SQL):
        return False
    for name, class_name in NEED_SQL.items():
        module = ModuleType(name, "A stub, see espalier.flower.stub_sqlalchemy.")
        setattr(module, class_name, type(class_name, (), {"__init__": _refuse}))
        sys.modules[name] = module
    return True
