"""Field types of settings, and the base class of a group of settings."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

FlatValue = bool | int | float | str
"""Types that a Flower run configuration can hold."""

LARGEST_EXACT = 2**53
"""Largest integer that a protobuf Struct keeps exactly: it stores every number as a double."""


def _whole_to_int(value: object) -> object:
    """Turn 5.0 into 5, because a Struct returns every number as a double."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Int = Annotated[int, BeforeValidator(_whole_to_int)]
PositiveInt = Annotated[int, BeforeValidator(_whole_to_int), Field(ge=1, le=LARGEST_EXACT)]
Count = Annotated[int, BeforeValidator(_whole_to_int), Field(ge=0, le=LARGEST_EXACT)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class SettingsGroup(BaseModel):
    """Settings that are declared together: those of the core, of a method or of an axis.

    A subclass has one field per setting, with a type, bounds, a default and a one-line description. The field
    `learning_rate` is the flat key ``learning-rate`` of ``flwr run --run-config`` and ``espalier run -c``. A key
    belongs to exactly one group. Instances are immutable.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    #: Fields that name places on the cloud's machine; a plan leaves them out.
    cloud_only: ClassVar[frozenset[str]] = frozenset()


def key_of(field: str) -> str:
    """Return the flat kebab-case key of a field."""
    return field.replace("_", "-")


def setting_error(text: str) -> PydanticCustomError:
    """Return what a field validator raises so that `text` becomes the error line of its setting."""
    return PydanticCustomError("espalier", "{fault}", {"fault": text})
