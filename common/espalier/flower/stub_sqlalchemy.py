"""Keeps Flower's databases out of a process that holds its state in memory: they are a fifth of what an edge loads.

Flower's link state comes in two kinds, and importing one imports the other, with SQLAlchemy and Alembic behind it.
Stand-ins take the places of the three modules that need a database, and say so when somebody makes one of their objects
after all. Where SQLAlchemy is there already nothing is done: whoever loaded it may want it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, NoReturn

#: Modules of Flower that need a database, and what its other modules import of them.
NEED_SQL = {
    "flwr.supercore.object_store.sql_object_store": "SqlObjectStore",
    "flwr.supercore.corestate.sql_corestate": "SqlCoreState",
    "flwr.server.superlink.linkstate.sql_linkstate": "SqlLinkState",
}


def _refuse(self: object, *_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(f"{type(self).__name__} was left out of this process, which keeps its state in memory")


def leave_out() -> bool:
    """Put the stand-ins in place; return whether that was to be done."""
    if "sqlalchemy" in sys.modules or any(name in sys.modules for name in NEED_SQL):
        return False
    for name, held in NEED_SQL.items():
        module = ModuleType(name, "A stand-in, see espalier.flower.stub_sqlalchemy.")
        setattr(module, held, type(held, (), {"__init__": _refuse}))
        sys.modules[name] = module
    return True
