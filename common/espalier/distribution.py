"""The installed distribution: its name, its version, and the command that installs one of its extras."""

from __future__ import annotations

import contextlib
import importlib.metadata

NAME = "espalier-fl"
"""Name of the distribution; the packages in it begin with ``espalier``."""


def version() -> str:
    """Return the version of the installed distribution."""
    return importlib.metadata.version(NAME)


def install_command(extra: str) -> str:
    """Return the command that installs an extra, e.g. ``pip install 'espalier-fl[sd]'``."""
    return f"pip install '{NAME}[{extra}]'"


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Espalier and of those of the packages that are installed, by name."""
    found = {"espalier": version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
