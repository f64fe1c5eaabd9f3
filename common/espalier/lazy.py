"""Late loading of heavy libraries: a module that is imported when one of its names is first used.

An edge aggregates in NumPy and has no torch, while the classes that a client needs stand in the same files. So a
module that must be importable without a library writes ::

    if TYPE_CHECKING:
        import torch
        from torch import Tensor            # names of annotations only
    else:
        torch = lazy.load("torch")

and uses ``torch.cat(...)`` as usual: type checkers and editors see the real module, and Python imports it upon first
use. Packages of our own whose modules define torch classes resolve their names in the same way: see
:mod:`espalier.models`, whose ``__init__.pyi`` lists them for ``lazy_loader.attach_stub``.

``lazy_loader.load`` is not used for libraries. It puts the unloaded module into ``sys.modules``, where Flower looks for
torch whenever it makes an Array, so every process would load it; and before Python 3.11.9 two threads that use such a
module for the first time may see it half initialised.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


def load(name: str) -> Any:
    """Return a module that is imported when one of its attributes is first read.

    Parameters
    ----------
    name : str
        Full name, e.g. ``"torch"`` or ``"torch.nn.functional"``. A library that is not installed raises
        ModuleNotFoundError upon first use, not here.
    """
    return _LazyModule(name)


class _LazyModule(ModuleType):
    """Stands for a module; `sys.modules` holds the real one once it is imported."""

    def __getattr__(self, attribute: str) -> Any:
        # import_module waits while another thread is importing the module.
        value = getattr(importlib.import_module(self.__name__), attribute)
        setattr(self, attribute, value)  # the next use does not come here
        return value
