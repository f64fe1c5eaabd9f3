"""The installed distribution: its name, version, requirements and entry points, and the command to install an extra."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import tomllib
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from packaging.requirements import Requirement

NAME = "espalier-fl"
"""Name of the distribution; the packages in it begin with ``espalier``."""

PACKAGES = ("espalier", "espalier_proto", "espalier_server", "espalier_edge", "espalier_client")
"""The importable packages of the distribution."""


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


def extras() -> tuple[str, ...]:
    """Return the names of the extras."""
    project = _checkout()
    if project is not None:
        return tuple(project["optional-dependencies"])
    return tuple(importlib.metadata.metadata(NAME).get_all("Provides-Extra") or ())


@cache
def requirements(extra: str = "") -> tuple[Requirement, ...]:
    """Return what the base installation requires, or what an extra adds to it.

    An extra that names another one (``espalier-fl[client]``) includes what that one adds.
    """
    project = _checkout()
    if project is not None:
        lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
        found = [Requirement(line) for line in lines]
    else:
        declared = [Requirement(line) for line in importlib.metadata.requires(NAME) or ()]
        base = [r for r in declared if r.marker is None or r.marker.evaluate({"extra": ""})]
        found = base
        if extra:
            found = [
                r for r in declared if r not in base and r.marker and r.marker.evaluate({"extra": extra})
            ]
    return tuple(
        other
        for requirement in found
        for other in (
            [inner for name in sorted(requirement.extras) for inner in requirements(name)]
            if requirement.name == NAME
            else [requirement]
        )
    )


def entry_points(group: str) -> list[EntryPoint]:
    """Return the entry points of a group by name; among those of one name, this distribution's."""
    found = {
        point.name: point
        for point in importlib.metadata.entry_points(group=group)
        if point.dist is None or point.dist.name != NAME
    }
    project = _checkout()
    if project is not None:
        own = [
            EntryPoint(name, value, group)
            for name, value in project.get("entry-points", {}).get(group, {}).items()
        ]
    else:
        own = [point for point in importlib.metadata.distribution(NAME).entry_points if point.group == group]
    found |= {point.name: point for point in own}
    return [found[name] for name in sorted(found)]


@cache
def _checkout() -> dict[str, Any] | None:
    """Return the ``[project]`` table of the checkout that is installed in editable mode, None if none is.

    The metadata of an editable installation are as old as the last ``pip install -e``; the packages are those of the
    checkout as it is now, and so are the requirements and entry points that belong to them.
    """
    text = importlib.metadata.distribution(NAME).read_text("direct_url.json")
    source = json.loads(text) if text else {}
    if not source.get("dir_info", {}).get("editable"):
        return None
    path = Path(url2pathname(urlsplit(source["url"]).path)) / "pyproject.toml"
    try:
        project: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    except (OSError, ValueError, KeyError):
        return None
    return project if project.get("name") == NAME else None
