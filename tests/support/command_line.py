"""The options of `espalier`'s commands, for tests that compare text with the command line."""

from __future__ import annotations

from typing import Any

import typer

from espalier.cli import command_line


def find_command(words: list[str]) -> tuple[str, Any]:
    """Return the command that the first words of a command line name, and its full name.

    Raises
    ------
    KeyError
        If there is no such command.
    """
    command: Any = typer.main.get_command(command_line())
    path = []
    for word in words:
        if not hasattr(command, "commands"):
            break
        command = command.commands[word]
        path.append(word)
    return " ".join(path), command


def options(*words: str) -> set[str]:
    """Return the options of a command, e.g. ``options("certs", "init")``."""
    _, command = find_command(list(words))
    return {option for parameter in command.params for option in parameter.opts}
