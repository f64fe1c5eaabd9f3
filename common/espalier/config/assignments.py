"""Reading ``key=value`` arguments of the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable

from espalier.config.fields import FlatValue
from espalier.errors import ConfigError


def parse_assignments(assignments: Iterable[str]) -> dict[str, FlatValue]:
    """Read ``key=value`` arguments of the command line; the last one of a key wins.

    A value is TOML (``5``, ``1e-4``, ``true``, ``"text"``); a value that is not valid TOML is read as plain text.

    Raises
    ------
    ConfigError
        For an argument without ``=``, without a key, or with a list, table or date as its value.
    """
    parsed: dict[str, FlatValue] = {}
    for word in assignments:
        key, equals, text = word.partition("=")
        key, text = key.strip(), text.strip()
        if not equals or not key:
            raise ConfigError(f"-c {word!r} is no setting; write it as -c key=value, e.g. -c rounds=20")
        value = _toml_value(text)
        if not isinstance(value, FlatValue):
            raise ConfigError(f"-c {word!r}: a setting is a number, true, false or a text, not {text}")
        parsed[key] = value
    return parsed


def _toml_value(text: str) -> object:
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if len(table) == 1 else text
