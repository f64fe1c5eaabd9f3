"""Families of heterogeneous classifiers by HtFLlib's names, and the one that a client trains; imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from espalier.errors import ConfigError
from espalier.models.presets import MODELS, is_model, task_of

__all__ = ["MODEL_FAMILIES", "family_models", "model_of"]

_DEEP = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_EIGHT = ("cnn4", "googlenet", "mobilenet-v2", *_DEEP)

MODEL_FAMILIES: Mapping[str, tuple[str, ...]] = {
    "HtFE-img-2": ("cnn4", "resnet18"),
    "HtFE-img-3": ("resnet10", "resnet18", "resnet34"),
    "HtFE-img-4": ("cnn4", "googlenet", "mobilenet-v2", "resnet18"),
    "HtFE-img-8": _EIGHT,
    "HtFE-img-9": ("resnet4", "resnet6", "resnet8", "resnet10", *_DEEP),
    "HtM10": (*_EIGHT, "vit-b-16", "vit-b-32"),
}
"""The models of each family, in the order in which clients get them (FedTGP and FedKTL's experiments)."""


def family_models(name: str) -> tuple[str, ...]:
    """Return the models of a family.

    Parameters
    ----------
    name : str
        A family, e.g. ``HtFE-img-8``, also as the papers write it (``HtFE8``, ``HtM10``), capitals or not; or
        classifiers, separated by commas: ``cnn4,resnet10``. A classifier may be named more than once, which
        gives it a larger share of the clients.

    Returns
    -------
    tuple of str
        Names of models.

    Raises
    ------
    ConfigError
        The name is neither a family's nor a model's, or a model is no classifier.
    """
    if (family := _SPELLINGS.get(_spelling(name))) is not None:
        return MODEL_FAMILIES[family]
    models = tuple(part.strip() for part in name.split(","))
    for model in models:
        if not model:
            raise ConfigError(
                f"models: {name!r} names no model in one place; give a family, e.g. HtFE-img-4, "
                "or classifiers separated by commas"
            )
        if not is_model(model):
            raise ConfigError(f"models: {model!r} is unknown{_meant(model)}; {_KNOWN}")
        if task_of(model) != "classification":
            raise ConfigError(f"models: {model} is not a classifier; {_KNOWN}")
    return models


def model_of(family: str | Sequence[str], place: int) -> str:
    """Return the model of the client at a place: ``family[place mod X]`` of a family of X models.

    Parameters
    ----------
    family : str or sequence of str
        As :func:`family_models` takes it, or what it returned.
    place : int
        The client's place among the run's clients, counted from 0.

    Raises
    ------
    ConfigError
        As :func:`family_models`.
    ValueError
        The place is negative or the sequence is empty.
    """
    models = family_models(family) if isinstance(family, str) else tuple(family)
    if not models:
        raise ValueError("the family has no models")
    if place < 0:
        raise ValueError(f"place {place} of a client is negative; places count from 0")
    return models[place % len(models)]


def _spelling(name: str) -> str:
    """Return what the spellings of a family's name have in common: "htfe8", "htm10"."""
    return name.strip().lower().replace("-", "").replace("img", "")


_SPELLINGS: Mapping[str, str] = {_spelling(name): name for name in MODEL_FAMILIES}
_KNOWN = (
    f"families are {', '.join(MODEL_FAMILIES)}; classifiers are "
    f"{', '.join(model for model in MODELS if task_of(model) == 'classification')}"
)


def _meant(name: str) -> str:
    near = difflib.get_close_matches(name, [*MODEL_FAMILIES, *MODELS], n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
