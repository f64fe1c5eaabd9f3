"""The run's configuration: the settings of the core, of all registered methods and of all axes, and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from google.protobuf.struct_pb2 import Struct
from pydantic import field_validator

from espalier.config.error_lines import not_among
from espalier.config.fields import FlatValue, key_of, setting_error
from espalier.config.run_settings import Groups, RunSettings, cloud_only
from espalier.errors import ConfigError
from espalier.methods.axes import all_groups, unused_settings
from espalier.methods.compatibility import contradictions
from espalier.methods.registry import METHODS, method_names
from espalier.models.presets import MODELS


class RunConfig(RunSettings):
    """The configuration of a run.

    The cloud reads it from flat settings (`from_flat`), an edge or a client from a plan (`from_struct`). Both check
    the settings one by one and against each other. Only `from_flat` refuses settings that the run does not use: a
    plan has passed this check, and lacks the settings it is decided by that name places on the cloud's machine.
    """

    # Type checkers derive a constructor that knows only the core's fields, unless the class itself has one.
    def __init__(self, **values: Any) -> None:
        super().__init__(**values)

    @field_validator("method")
    @classmethod
    def _check_method(cls, value: str) -> str:
        if value not in METHODS:
            raise setting_error(not_among(value, method_names()))
        return value

    @field_validator("model")
    @classmethod
    def _check_model(cls, value: str) -> str:
        if value not in MODELS:
            raise setting_error(not_among(value, MODELS))
        return value

    @classmethod
    def groups(cls) -> Groups:
        """Return the groups of all axes and of all registered methods."""
        return all_groups(METHODS.values())

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> Self:
        """Validate flat kebab-case settings; missing ones have their defaults.

        Raises
        ------
        ConfigError
            With one line per fault: an unknown key, an invalid value, settings that conflict, or a setting that
            differs from its default although the run does not use it.
        """
        return cls._checked(flat, unused=True)

    @classmethod
    def from_struct(cls, struct: Struct) -> Self:
        """Validate the settings of a received plan; raises ConfigError as `from_flat`."""
        return cls._checked(cls.sent_settings(struct), unused=False)

    @classmethod
    def from_record(cls, flat: Mapping[str, Any]) -> Self:
        """Validate the settings in the record of an earlier run.

        Settings that the run does not use have their defaults: versions before this check recorded whatever was
        set.

        Raises
        ------
        ConfigError
            As `from_flat`.
        """
        settings = cls._checked(flat, unused=False)
        ignored = {group for group, _ in unused_settings(METHODS, settings).values()}
        return settings.without(ignored) if ignored else settings

    @classmethod
    def _checked(cls, flat: Mapping[str, Any], *, unused: bool) -> Self:
        settings, faults = cls.parse(flat)
        if settings is not None and not faults:
            if unused:
                faults += [line for _, line in unused_settings(METHODS, settings).values()]
            faults += contradictions(METHODS[settings.method], settings)
        if settings is None or faults:
            raise ConfigError("\n  ".join([f"run configuration, {len(faults)} fault(s):", *faults]))
        return settings


def with_defaults(defaults: Mapping[str, FlatValue], given: Mapping[str, FlatValue]) -> dict[str, FlatValue]:
    """Return the given settings and those of the defaults that the run uses.

    For callers such as the demo, whose own defaults must fit every method and model that a user may choose.

    Parameters
    ----------
    defaults, given : mapping
        Flat settings; `given` takes precedence.

    Returns
    -------
    dict
        Flat settings, not validated.
    """
    both = {**defaults, **given}
    settings, _ = RunConfig.parse(both)
    unused = set() if settings is None else {key_of(field) for field in unused_settings(METHODS, settings)}
    return {key: value for key, value in both.items() if key in given or key not in unused}


CLOUD_ONLY = cloud_only(RunConfig.groups())
"""Keys of settings that name places on the cloud's machine; they are never part of a plan."""
