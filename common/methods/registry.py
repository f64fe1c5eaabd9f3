"""The methods by name: a new method is a new file and a line here."""

from __future__ import annotations

from common.errors import ConfigError
from common.methods.base import Method
from common.methods.fedavg import FedAvg
from common.methods.fedphd import FedPhD, FedPhDOneShot
from common.run.config import RunConfig

METHODS: dict[str, type[Method]] = {m.name: m for m in (FedAvg, FedPhD, FedPhDOneShot)}


def method_names() -> tuple[str, ...]:
    """Return the names that `-c method=…` accepts."""
    return tuple(sorted(METHODS))


def create_method(settings: RunConfig) -> Method:
    """Return the method a run asks for.

    Raises
    ------
    ConfigError
        If there is none of that name.
    """
    if settings.method not in METHODS:
        raise ConfigError(f"method={settings.method!r} is unknown; choose one of {', '.join(method_names())}")
    return METHODS[settings.method](settings)
