"""The requirements that an image installs, from pyproject.toml: torch first, then the base and the chosen extras."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

#: Installed first, from TORCH_INDEX if the build names one. The second pip call finds them installed.
FIRST = ("torch", "torchvision")

CUDA_WHEELS = """\
The package index offers a CUDA build of torch ({names} …) of several gigabytes, but this image is for CPUs.
Name the index of CPU wheels that PyTorch's installation page shows for "pip" and "CPU":
    docker-compose build --build-arg TORCH_INDEX=ADDRESS        (or TORCH_INDEX=ADDRESS in .env)
or build for GPUs with --build-arg COMPUTE=cuda (docker/gpu.yml does)."""


def requirements(project: dict[str, object], extras: list[str]) -> list[str]:
    """Return the requirements of the base and of the named extras, without duplicates.

    A requirement of the project itself (``espalier-fl[client]``) is replaced by the requirements of those extras.

    Parameters
    ----------
    project : dict
        The ``[project]`` table.
    extras : list of str
        Names of optional dependencies.

    Raises
    ------
    SystemExit
        An extra does not exist.
    """
    base, optional = project["dependencies"], project["optional-dependencies"]
    assert isinstance(base, list)
    assert isinstance(optional, dict)
    if unknown := [name for name in extras if name not in optional]:
        sys.exit(f"EXTRAS names {', '.join(unknown)}; there are {', '.join(optional)}")
    lines: list[str] = list(base)
    for name in extras:
        for line in optional[name]:
            inner = re.fullmatch(rf"{project['name']}\[([\w,-]+)\]", line)
            more = requirements(project, inner[1].split(",")) if inner else [line]
            lines += [line for line in more if line not in lines]
    return lines


def is_first(requirement: str) -> bool:
    """Return whether a requirement is one of `FIRST`."""
    name = re.match(r"[\w.-]+", requirement)
    return name is not None and name[0] in FIRST


def check_cpu(plan: dict[str, object]) -> None:
    """Refuse a CUDA build of torch for an image that computes on CPUs.

    Parameters
    ----------
    plan : dict
        The report of ``pip install --dry-run --report``.

    Raises
    ------
    SystemExit
        The plan contains CUDA libraries; the message says what to do.
    """
    installs = plan["install"]
    assert isinstance(installs, list)
    names = [item["metadata"]["name"] for item in installs]
    if cuda := [name for name in names if name.startswith(("nvidia-", "cuda-"))]:
        sys.exit(CUDA_WHEELS.format(names=", ".join(cuda[:3])))


def main(command: str, *arguments: str) -> None:
    """Run ``first PYPROJECT EXTRAS``, ``rest PYPROJECT EXTRAS`` or ``check-cpu`` (a report on stdin)."""
    if command == "check-cpu":
        check_cpu(json.load(sys.stdin))
        return
    pyproject, extras = arguments
    project = tomllib.loads(Path(pyproject).read_text(encoding="utf-8"))["project"]
    names = [name for name in extras.split(",") if name]
    print("\n".join(line for line in requirements(project, names) if is_first(line) == (command == "first")))


if __name__ == "__main__":
    main(*sys.argv[1:])
