"""Networks, pruning and building a model from an ArchitectureSpec.

The names in ``__init__.pyi`` are available as ``models.NAME``; their modules, which need torch, are imported when
a name is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
