"""Names of runs, clouds, edges and clients: restricted, because they appear in file names and reports."""

from __future__ import annotations

import re

from espalier.errors import ConfigError, WireError

NAME_RULE = "1 to 64 letters, digits, '.', '-' or '_', no sign at either end"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")


def is_name(text: str) -> bool:
    """Whether `text` is a valid name (`NAME_RULE`), which is also safe as a file name."""
    return _NAME.fullmatch(text) is not None


def check_name(text: str, what: str) -> str:
    """Return a name that a user gave.

    Parameters
    ----------
    text : str
        The name.
    what : str
        What it names, for the message, e.g. ``"--name"``.

    Raises
    ------
    ConfigError
        If it is not a valid name.
    """
    if not is_name(text):
        raise ConfigError(f"{what} {text!r} is not a valid name; use {NAME_RULE}")
    return text


def check_sender(name: str) -> None:
    """Check a name that was received in a message.

    Raises
    ------
    WireError
        If it is not a valid name.
    """
    if not is_name(name):
        raise WireError(name[:64], f"a name is {NAME_RULE}")
