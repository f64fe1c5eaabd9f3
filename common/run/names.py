"""Names a user gives on the command line or in the configuration: run ids, clouds, edges, clients."""

from __future__ import annotations

from common import names
from common.errors import ConfigError, WireError

NAME_RULE = "1 to 64 letters, digits, '.', '-' or '_', no sign at either end"


def is_name(text: str) -> bool:
    """Whether `text` is a name, and so may become a folder's: see `NAME_RULE`."""
    try:
        names.check_name(text)
    except WireError:
        return False
    return True


def check_name(text: str, what: str) -> str:
    """Return `text` if it is a name, else raise ConfigError; `what` says what it names, e.g. ``"--name"``."""
    if not is_name(text):
        raise ConfigError(f"{what} {text!r} is no name; use {NAME_RULE}")
    return text
