"""Imports torchvision, whose CUDA build cannot be imported with a CPU-only torch.

The registry's torchvision wheel loads its compiled operators from a library that needs CUDA. If that
library cannot be loaded, ``import torchvision`` ends with ``operator torchvision::nms does not exist``,
although data sets, transforms and models never call that operator. Declaring the schemas of the two operators
that torchvision registers shape functions for is enough to import the package. diffusers imports torchvision
too, so call :func:`import_torchvision` before importing a model from it.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from espalier import lazy

if TYPE_CHECKING:
    import torch
else:
    torch = lazy.load("torch")

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# A torch Library removes its schemas when it is garbage-collected, so it is never released.
_library: Any = None


def import_torchvision() -> ModuleType:
    """Import torchvision, declaring its operators' schemas if the plain import fails without them.

    Returns
    -------
    ModuleType
        The imported ``torchvision``.

    Raises
    ------
    ImportError
        torchvision is not installed.
    RuntimeError
        The import fails for another reason than a missing operator.
    """
    global _library
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if _library is not None or "operator torchvision::" not in str(error):
            raise
    library: Any = cast(Any, torch.library).Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _library = library
    # The failed attempt leaves half-initialised submodules behind.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return importlib.import_module("torchvision")
