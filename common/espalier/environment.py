"""Checks of the Python environment: one Espalier, a supported Flower, and the libraries that a command needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

from espalier import distribution
from espalier.errors import ConfigError

FORMER_NAME = "espalier"
"""Name of this distribution before it was published; on PyPI it belongs to another project."""

#: Distributions whose module has another name.
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "google": "protobuf",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
}


def check_installation() -> None:
    """Check that the packages of one Espalier, and only of one, are installed here.

    Raises
    ------
    ConfigError
        A package is missing, packages come from different places, or a distribution named ``espalier`` is installed.
    """
    try:
        distribution.version()
    except importlib.metadata.PackageNotFoundError as error:
        folder = Path(__file__).resolve().parent
        raise ConfigError(
            f"{folder} is not installed: {sys.prefix} has no distribution {distribution.NAME!r}; "
            "run `pip install -e .` in the checkout, or `pip install` the wheel"
        ) from error
    places = {name: _place(name) for name in distribution.PACKAGES}
    missing = [name for name, place in places.items() if place is None]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} cannot be imported from {sys.prefix}; the installation is incomplete: "
            f"run `pip uninstall {distribution.NAME}`, then install it again"
        )
    if len(set(places.values())) > 1:
        name, place = next((n, p) for n, p in places.items() if p != places["espalier"])
        raise ConfigError(
            f"two Espaliers: espalier is imported from {places['espalier']}, {name} from {place}; "
            "remove one of them from PYTHONPATH or from the environment"
        )
    try:
        other = importlib.metadata.distribution(FORMER_NAME)
    except importlib.metadata.PackageNotFoundError:
        return
    raise ConfigError(
        f"two Espaliers: {other.locate_file('')} also holds the distribution {other.metadata['Name']} {other.version}, "
        f"whose package has the same name; run `pip uninstall {FORMER_NAME} {distribution.NAME}`, then install "
        f"{distribution.NAME} again"
    )


def _place(package: str) -> Path | None:
    """Return the folder that holds a package: site-packages, or the checkout with a folder for each package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    parent = Path(spec.origin).resolve().parents[1]
    return parent.parent if (parent.parent / "pyproject.toml").exists() else parent


def check_libraries(*extras: str) -> None:
    """Check that Flower has a supported version and that the libraries of the base and of `extras` are installed.

    Raises
    ------
    ConfigError
        One is missing, or Flower is out of range; with the command that mends it.
    """
    if faults := unsupported():
        raise ConfigError("; ".join(faults))
    for extra in extras:
        if lacking := missing(extra):
            verb = "is" if len(lacking) == 1 else "are"
            raise ConfigError(
                f"{', '.join(lacking)} {verb} not installed in {sys.prefix}; "
                f"run: {distribution.install_command(extra)}"
            )


def missing(extra: str = "") -> list[str]:
    """Return the distributions that an extra ("": the base) requires and this environment lacks."""
    return [r.name for r in distribution.requirements(extra) if _installed(r.name) is None]


def unsupported() -> list[str]:
    """Return what is wrong with the base: a missing library, or a Flower whose internals this version does not know."""
    faults = []
    for requirement in distribution.requirements():
        found = _installed(requirement.name)
        wanted = f"{requirement.name}{requirement.specifier}"
        if found is None:
            faults.append(f"{requirement.name} is not installed in {sys.prefix}; run: pip install '{wanted}'")
        elif requirement.name == "flwr" and not requirement.specifier.contains(found, prereleases=True):
            faults.append(
                f"flwr {found} in {sys.prefix} is out of range: this Espalier works with {wanted}; "
                f"run: pip install '{wanted}'"
            )
    return faults


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def explain(error: ModuleNotFoundError) -> ConfigError | None:
    """Return the error to show for a library that could not be imported; None where no extra includes it."""
    module = (error.name or "").partition(".")[0]
    name = _DISTRIBUTIONS.get(module, module).replace("_", "-")
    for extra in ("", *distribution.extras()):
        if name in {requirement.name for requirement in distribution.requirements(extra)}:
            command = distribution.install_command(extra) if extra else f"pip install {distribution.NAME}"
            return ConfigError(f"{name} is not installed in {sys.prefix}; run: {command}")
    return None
