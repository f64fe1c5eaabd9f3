"""One line per invalid setting: its key, what is wrong with the value, and how to correct it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from pydantic_core import ErrorDetails

from espalier.config.fields import SettingsGroup, key_of


def explain(detail: ErrorDetails, group: type[SettingsGroup]) -> str:
    """Return the line for one error that pydantic found in a group.

    Parameters
    ----------
    detail : ErrorDetails
        An entry of ``ValidationError.errors()``.
    group : type of SettingsGroup
        The group that was validated.
    """
    name = str(detail["loc"][0]) if detail["loc"] else ""
    key = key_of(name)
    value, kind, context = detail["input"], detail["type"], detail.get("ctx", {})
    if kind == "espalier":
        return f"{key}: {detail['msg']}"
    annotation, example = group.model_fields[name].annotation, _example(group, name)
    if kind == "literal_error":
        return f"{key}: {not_among(value, get_args(annotation))}"
    if kind == "string_pattern_mismatch":
        return f"{key}: {show(value)} is not understood; use auto, cpu, mps, cuda or cuda:N"
    if kind == "string_too_short":
        return f"{key}: is empty; give a name, e.g. {key}={example}"
    bounds = {"greater_than": "above", "greater_than_equal": "at least", "less_than": "below"}
    bounds["less_than_equal"] = "at most"
    if kind in bounds:
        limit = next(context[short] for short in ("gt", "ge", "lt", "le") if short in context)
        return f"{key}: {show(value)} is out of range; it must be {bounds[kind]} {limit:.16g}"
    if kind == "finite_number":
        return f"{key}: {value} is not a finite number; give one, e.g. {key}={example}"
    wanted = f"{_expected(annotation)} is expected, e.g. {key}={example}"
    return f"{key}: {show(value)} is {_kind(value)}; {wanted}"


def _expected(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(get_args(annotation))
    words: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number"}
    return words.get(annotation, "a text")


def _example(group: type[SettingsGroup], name: str) -> str:
    default = group.model_fields[name].default
    return str(default).lower() if isinstance(default, bool) else show(default)


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int):
        return "a whole number"
    if isinstance(value, float):
        return "a number with a fraction"
    return "a text" if isinstance(value, str) else f"a {type(value).__name__}"


def show(value: object) -> str:
    """Return a value as it is written in TOML."""
    if isinstance(value, str):
        return f'"{value}"'
    return str(value).lower() if isinstance(value, bool) else str(value)


def not_among(value: object, names: Iterable[str]) -> str:
    """Return that a value is not one of the names, with the names and the closest one."""
    names = list(names)
    return f"{show(value)} is none of {', '.join(names)}{closest(str(value), names)}"


def closest(word: str, words: Iterable[str]) -> str:
    """Return ``; did you mean "…"?`` with the most similar word, or an empty text if none is similar."""
    close = difflib.get_close_matches(word.lower().replace("_", "-"), list(words), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""
