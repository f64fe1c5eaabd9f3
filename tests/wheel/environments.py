"""Virtual environments with the wheel: one made by pip, others with links to the libraries of this environment."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement

from tests.support.paths import ROOT


@dataclass(frozen=True)
class Environment:
    """A virtual environment without pip."""

    folder: Path

    @property
    def python(self) -> Path:
        """The interpreter."""
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        """The folder site-packages."""
        return next((self.folder / "lib").glob("python3*/site-packages"))

    def command(self, *words: str) -> list[str]:
        """Return a command line of `espalier` here."""
        return [str(self.folder / "bin" / "espalier"), *words]

    def size(self) -> int:
        """Return the bytes of all its files."""
        return sum(path.lstat().st_size for path in self.folder.rglob("*"))


def build_wheel(folder: Path) -> Path:
    """Build the source distribution, and from it the wheel, as `python -m build` does.

    Without isolation: this environment has hatchling.
    """
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    _run(command)
    return next(folder.glob("*.whl"))


def install_base(folder: Path, wheel: Path) -> Environment:
    """Make an environment with what pip installs for the wheel without extras."""
    environment = _empty(folder)
    _pip(environment, "install", str(wheel), "--constraint", str(ROOT / "constraints.txt"))
    return environment


def install_extra(folder: Path, wheel: Path, extra: str) -> Environment:
    """Make an environment with the wheel and exactly the libraries that it requires with an extra.

    The libraries are hard links to those of this environment: pip would take minutes and a gigabyte to install the
    same again.
    """
    environment = _empty(folder)
    _pip(environment, "install", "--no-deps", str(wheel))
    found = next(d for d in importlib.metadata.distributions(path=[str(environment.packages)]))
    for distribution in _required(found, {extra}):
        _link(distribution, environment)
    return environment


def _empty(folder: Path) -> Environment:
    venv.create(folder, with_pip=False, symlinks=True)
    return Environment(folder)


def _pip(environment: Environment, *words: str) -> None:
    _run([sys.executable, "-m", "pip", "--python", str(environment.python), "--quiet", *words])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _required(root: Distribution, extras: set[str]) -> Iterator[Distribution]:
    """Yield the distributions of this environment that one requires with its extras, directly or not."""
    waiting = [(root, extra) for extra in ("", *extras)]
    seen: set[tuple[str, str]] = set()
    while waiting:
        distribution, extra = waiting.pop()
        for line in distribution.requires or []:
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            name = _normal(requirement.name)
            other = root if name == _normal(root.name) else importlib.metadata.distribution(name)
            for more in {"", *requirement.extras} - {e for n, e in seen if n == name}:
                seen.add((name, more))
                waiting.append((other, more))
                if more == "" and other is not root:
                    yield other


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _link(distribution: Distribution, environment: Environment) -> None:
    """Link a distribution's files into an environment; scripts are copied, because they name their interpreter."""
    source = Path(str(distribution.locate_file(""))).resolve()
    for file in distribution.files or []:
        original = Path(os.path.normpath(source / file))
        if not original.exists():
            continue
        if original.is_relative_to(source):
            target = environment.packages / original.relative_to(source)
        else:  # ../../../bin/NAME
            target = environment.folder / "bin" / original.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            continue
        if target.parent.name == "bin" and original.read_bytes()[:2] == b"#!":
            _, _, rest = original.read_bytes().partition(b"\n")
            target.write_bytes(f"#!{environment.python}\n".encode() + rest)
            target.chmod(0o755)
        else:
            _hard_link(original, target)


def _hard_link(original: Path, target: Path) -> None:
    try:
        os.link(original, target)
    except OSError:  # another file system
        target.symlink_to(original)
