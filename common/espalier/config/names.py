"""Names a user gives on the command line or in the configuration: run ids, clouds, edges, clients."""

from __future__ import annotations

from espalier.errors import ConfigError
from espalier.names import NAME_RULE, is_name

__all__ = ["NAME_RULE", "check_name", "is_name"]


def check_name(text: str, what: str) -> str:
    """Return `text` if it is a name, else raise ConfigError; `what` says what it names, e.g. ``"--name"``."""
    if not is_name(text):
        raise ConfigError(f"{what} {text!r} is no name; use {NAME_RULE}")
    return text
