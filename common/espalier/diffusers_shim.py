"""The one place diffusers' networks are imported through: it takes along every optional package that it finds.

A client trains a U-Net, which needs none of them, and its own install has none. On a machine that has them for
another tier (a demonstration, a test bed) transformers and SciPy cost every client 2.3 s of processor time and 80 MB.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

from espalier.torchvision_shim import import_torchvision

#: What diffusers imports where it is installed, and neither a UNet2DModel nor a noise schedule needs.
OPTIONAL = ("accelerate", "peft", "scipy", "transformers")

_alone = False


def leave_out_optional() -> None:
    """Have diffusers do without its optional packages in this process; too late where it is imported already.

    Its pipelines that need them are then not to be had here. Others may import the packages as before.
    """
    global _alone
    _alone = True


def import_diffusers() -> ModuleType:
    """Import diffusers with its U-Net, which takes seconds in a fresh process."""
    import_torchvision()  # diffusers imports it as it is
    if "diffusers" in sys.modules:
        return importlib.import_module("diffusers")
    with _absent(OPTIONAL) if _alone else contextlib.nullcontext():
        importlib.import_module("diffusers.models.unets.unet_2d")
        return importlib.import_module("diffusers")


@contextlib.contextmanager
def _absent(names: tuple[str, ...]) -> Iterator[None]:
    """Make packages that nobody imported yet look as if they were not installed."""
    hidden = [name for name in names if name not in sys.modules]
    # None is how Python itself marks what cannot be imported.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, name) is None:
                del sys.modules[name]
