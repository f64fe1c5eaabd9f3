"""Federated learning methods, one algorithm per module.

A method's module contains its server side and its client side in the order of the paper's algorithm. Edges aggregate in
NumPy and import these modules without torch, so heavy libraries are loaded late, by one rule:

- Libraries: ``torch = lazy.load("torch")`` in the ``else`` branch of ``if TYPE_CHECKING:``, which imports the same
  name for type checkers; names that are used in annotations only (``Tensor``, ``Generator``) are imported under
  ``TYPE_CHECKING`` alone (:mod:`espalier.lazy`). Runtime uses, ``isinstance`` included, read ``torch.Tensor``.
- Networks: ``from espalier import models`` and ``models.initial_model(...)``. The package resolves its names upon
  first use.
- A module of ours that defines torch classes (``fedktl.client``) is loaded as a library is.
- All other modules of ours are imported at the top of the file. There are no imports inside functions.

What several methods share: `base` (the hooks), `selection` and `planning` (participants and their edges), `levels` and
`submodels` (sub-models), `personal` (personal layers), `own_models` and `class_tables` (model-heterogeneous methods),
`proximal` (the proximal term), `aggregate` (aggregation), `views` (what is sent to a client).
"""
