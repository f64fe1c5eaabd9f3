"""The settings of a run: the core's as attributes, those of methods and axes by group."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from functools import cache, lru_cache
from typing import Any, Self, TypeVar, cast

from google.protobuf.struct_pb2 import Struct
from pydantic import PrivateAttr, ValidationError

from espalier.config.core import CoreSettings
from espalier.config.error_lines import closest, explain
from espalier.config.fields import FlatValue, SettingsGroup, key_of
from espalier.errors import ConfigError

DEFAULTS = "defaults"
"""Key in a plan's settings of the fingerprint of the sender's defaults."""

Groups = tuple[type[SettingsGroup], ...]
G = TypeVar("G", bound=SettingsGroup)


class RunSettings(CoreSettings):
    """The settings of a run.

    The core's settings are attributes (``settings.rounds``); a method or an axis reads its own through `of`
    (``settings.of(FedProx.Settings).prox_mu``). This class knows only how groups are composed, validated and
    written; `espalier.methods.run_config.RunConfig` says which groups there are and what they must agree on.

    Parameters
    ----------
    **values
        Settings by field name, of the core or of any group; the others have their defaults.
    """

    _groups: dict[type[SettingsGroup], SettingsGroup] = PrivateAttr(default_factory=dict)

    def __init__(self, **values: Any) -> None:
        parts = _by_group(type(self).groups(), values)
        super().__init__(**parts.pop(CoreSettings))
        self._keep({group: group(**part) for group, part in parts.items()})

    @classmethod
    def groups(cls) -> Groups:
        """Return the groups besides the core's, in the order in which their settings are listed."""
        return ()

    def of(self, group: type[G]) -> G:
        """Return the settings of one group, e.g. ``settings.of(FedProx.Settings)``."""
        return cast(G, self._groups.get(group) or _defaults_of(group))

    def value(self, field: str) -> FlatValue:
        """Return one setting of any group by its field name."""
        group, _ = keys_of(type(self).groups())[key_of(field)]
        found: FlatValue = getattr(self if group is CoreSettings else self.of(group), field)
        return found

    def _keep(self, groups: Mapping[type[SettingsGroup], SettingsGroup]) -> None:
        # Without groups at their defaults, so that equal settings compare equal.
        self._groups = {group: own for group, own in groups.items() if own != _defaults_of(group)}

    def without(self, groups: Collection[type[SettingsGroup]]) -> Self:
        """Return the same settings with the defaults of some groups."""
        copy = self.model_copy()
        copy._keep({group: own for group, own in self._groups.items() if group not in groups})
        return copy

    # --- reading -----------------------------------------------------------------------------------

    @classmethod
    def parse(cls, flat: Mapping[str, Any]) -> tuple[Self | None, list[str]]:
        """Validate flat kebab-case settings one by one; missing ones have their defaults.

        Returns
        -------
        settings : RunSettings or None
            None if a value is invalid.
        faults : list of str
            One line per unknown key and invalid value.
        """
        keys = keys_of(cls.groups())
        faults = [f"{key}: unknown setting{closest(key, keys)}" for key in flat if key not in keys]
        values = {keys[key][1]: value for key, value in flat.items() if key in keys}
        parts = _by_group(cls.groups(), values)
        settings: Self | None = None
        built: dict[type[SettingsGroup], SettingsGroup] = {}
        try:
            settings = cls(**parts.pop(CoreSettings))
        except ValidationError as error:
            faults += [explain(detail, CoreSettings) for detail in error.errors(include_url=False)]
        for group, part in parts.items():
            try:
                built[group] = group(**part)
            except ValidationError as error:
                faults += [explain(detail, group) for detail in error.errors(include_url=False)]
        if settings is None or len(built) < len(parts):
            return None, faults
        settings._keep(built)
        return settings, faults

    @classmethod
    def sent_settings(cls, struct: Struct) -> dict[str, Any]:
        """Return the settings in a received plan that differ from their defaults, not validated.

        Raises
        ------
        ConfigError
            If the sender's defaults differ from this installation's.
        """
        sent = dict(struct.items())
        fingerprint = sent.pop(DEFAULTS, None)
        if fingerprint is not None and fingerprint != _fingerprint(cls.groups()):
            raise ConfigError(
                "the sender's default settings are not this side's; install the same version of espalier-fl on both"
            )
        return sent

    # --- writing -----------------------------------------------------------------------------------

    def to_flat(self) -> dict[str, FlatValue]:
        """Return every setting under its flat kebab-case key."""
        values = self.model_dump()
        for group in type(self).groups():
            values.update(self.of(group).model_dump())
        return {key_of(name): value for name, value in values.items()}

    def to_struct(self) -> Struct:
        """Return the settings as a protobuf Struct for a plan.

        The Struct holds the settings that differ from their defaults, except places on the cloud's machine, and a
        fingerprint of all defaults. A plan goes to every client in every round, and a client may send only a few
        hundred bytes itself; all settings would take thousands.
        """
        groups = type(self).groups()
        defaults, local = _default_flat(groups), cloud_only(groups)
        changed = {k: v for k, v in self.to_flat().items() if k not in local and v != defaults[k]}
        struct = Struct()
        struct.update(changed | {DEFAULTS: _fingerprint(groups)})
        return struct


@lru_cache(maxsize=8)
def keys_of(groups: Groups) -> Mapping[str, tuple[type[SettingsGroup], str]]:
    """Map each flat key of the core and of the groups to its group and field name, in their order.

    Raises
    ------
    ValueError
        If two groups declare the same key.
    """
    keys: dict[str, tuple[type[SettingsGroup], str]] = {}
    for group in _with_core(groups):
        for field in group.model_fields:
            if (key := key_of(field)) in keys:
                raise ValueError(f"{key} is declared by {keys[key][0].__qualname__} and {group.__qualname__}")
            keys[key] = group, field
    return keys


@lru_cache(maxsize=8)
def cloud_only(groups: Groups) -> frozenset[str]:
    """Return the keys of settings that name places on the cloud's machine; they are never part of a plan."""
    return frozenset(key_of(field) for group in _with_core(groups) for field in group.cloud_only)


def _with_core(groups: Groups) -> Groups:
    return (CoreSettings, *groups)


def _by_group(groups: Groups, values: Mapping[str, Any]) -> dict[type[SettingsGroup], dict[str, Any]]:
    """Split values by the group of their field; the core, which also takes unknown fields, comes first."""
    keys = keys_of(groups)
    parts: dict[type[SettingsGroup], dict[str, Any]] = {CoreSettings: {}}
    for field, value in values.items():
        group = keys[key_of(field)][0] if key_of(field) in keys else CoreSettings
        parts.setdefault(group, {})[field] = value
    return parts


@cache
def _defaults_of(group: type[SettingsGroup]) -> SettingsGroup:
    return group()


@lru_cache(maxsize=8)
def _default_flat(groups: Groups) -> Mapping[str, FlatValue]:
    found = ((field, value) for group in _with_core(groups) for field, value in group().model_dump().items())
    return {key_of(field): value for field, value in found}


@lru_cache(maxsize=8)
def _fingerprint(groups: Groups) -> str:
    text = json.dumps(dict(_default_flat(groups)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
