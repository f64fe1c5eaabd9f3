"""The unit tests of ``espalier.wire.codec`` are in ``tests/unit/espalier/wire/test_codec.py``, and so on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tests.support.paths import ROOT

UNIT = ROOT / "tests" / "unit"
PACKAGES = ("espalier", "espalier_client", "espalier_edge", "espalier_server")
#: Tests of a property that several modules share; by file, with the property.
SHARED = {
    "espalier/methods/test_aggregation.py": "weights and shapes of means, for several methods",
    "espalier/methods/test_client_state.py": "client state of SCAFFOLD and FedDyn",
}


def module_of(path: Path) -> str | None:
    """Return the module or package whose tests a file holds.

    ``test_<module>.py`` holds them, and where they are many ``test_<module>_<topic>.py`` holds some of them.
    """
    package = ".".join(path.relative_to(UNIT).parent.parts)
    words = path.stem.removeprefix("test_").split("_")
    for count in range(len(words), 0, -1):
        name = f"{package}.{'_'.join(words[:count])}"
        if importlib.util.find_spec(name) is not None:
            return name
    return None


def test_files_name_the_module_they_test() -> None:
    files = [path for package in PACKAGES for path in sorted((UNIT / package).rglob("test_*.py"))]
    assert len(files) > 100
    lost = {path.relative_to(UNIT).as_posix() for path in files if module_of(path) is None}
    assert lost <= set(SHARED)
