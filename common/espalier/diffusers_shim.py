"""Imports diffusers, on a client without its optional packages.

diffusers imports every optional package that is installed. A client trains a U-Net, which needs none of them. On a
machine that has them for another tier, transformers and SciPy cost every client 2.3 s of processor time and 80 MB.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

from espalier.torchvision_shim import import_torchvision

#: Packages that diffusers imports if they are installed, and that neither a UNet2DModel nor a noise schedule needs.
OPTIONAL = ("accelerate", "peft", "scipy", "transformers")

_without_optional = False


def leave_out_optional() -> None:
    """Import diffusers without its optional packages in this process; has no effect after diffusers is imported.

    Its pipelines that need them are then not available. Other modules may import the packages as usual.
    """
    global _without_optional
    _without_optional = True


def import_diffusers() -> ModuleType:
    """Import diffusers with its U-Net, which takes seconds in a fresh process."""
    import_torchvision()  # diffusers imports it without the shim
    if "diffusers" in sys.modules:
        return importlib.import_module("diffusers")
    with _absent(OPTIONAL) if _without_optional else contextlib.nullcontext():
        importlib.import_module("diffusers.models.unets.unet_2d")
        return importlib.import_module("diffusers")


@contextlib.contextmanager
def _absent(names: tuple[str, ...]) -> Iterator[None]:
    """Make packages that are not imported yet appear as not installed."""
    hidden = [name for name in names if name not in sys.modules]
    # Python treats None as a module that cannot be imported.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, name) is None:
                del sys.modules[name]
