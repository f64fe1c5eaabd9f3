"""Which groups of settings each method and each choice of an axis uses, and which of them a run leaves unused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from espalier.config.core import CoreSettings
from espalier.config.fields import SettingsGroup, key_of
from espalier.config.run_settings import Groups, RunSettings
from espalier.generators.base import (
    PICKLED,
    DenoisingSettings,
    GeneratorSettings,
    PromptSettings,
    TrustSettings,
)
from espalier.methods.base import Method
from espalier.methods.faug import AugmentSettings, FAugSettings
from espalier.methods.homogeneity import ScoreSettings
from espalier.methods.planning import EdgeChoiceSettings, HomogeneitySettings
from espalier.methods.selection import SELECTIONS, SelectionSettings
from espalier.methods.shape import ShapeSettings
from espalier.models.presets import task_of
from espalier.tasks.diffusion_settings import DiffusionSettings
from espalier.training.privacy import DeltaSettings, PrivacySettings
from espalier.wire.codec_registry import CodecSettings
from espalier.wire.compression import QSGD, TopK

#: Groups that every run uses beside the core's.
COMMON: Groups = (
    SelectionSettings,
    EdgeChoiceSettings,
    ScoreSettings,
    CodecSettings,
    PrivacySettings,
    AugmentSettings,
)

Chosen = Callable[[type[Method], RunSettings], Iterable[str]]


@dataclass(frozen=True)
class Axis:
    """A choice that a run makes independently of its method.

    Attributes
    ----------
    owner : str
        What a setting belongs to, in messages; ``{}`` stands for the choices, e.g. ``selection={}``.
    uses : mapping of str to tuple of groups
        The groups that each choice uses; choices without settings of their own are left out.
    chosen : callable
        The choices of a run, by its method and settings, with "auto" resolved.
    run : callable
        What does not use a setting, in messages, e.g. ``selection=uniform``.
    """

    owner: str
    uses: Mapping[str, Groups]
    chosen: Chosen
    run: Callable[[type[Method], RunSettings], str] = lambda method, settings: "this run"


def _chosen_axis(axis: str, *uses: tuple[str, Groups]) -> Axis:
    """Return the axis of a setting whose "auto" the method resolves."""
    key = key_of(axis)
    return Axis(
        f"{key}={{}}",
        dict(uses),
        lambda method, settings: [method.chosen(settings, axis)],
        lambda method, settings: f"{key}={method.chosen(settings, axis)}",
    )


def axes() -> tuple[Axis, ...]:
    """Return the axes; selection rules are those registered so far."""
    return (
        _chosen_axis(
            "selection",
            *((name, rule.uses) for name, rule in sorted(SELECTIONS.items()) if rule.uses),
        ),
        _chosen_axis("edge_choice", ("homogeneity", (HomogeneitySettings,)), ("shape", (ShapeSettings,))),
        Axis(
            "codec={} or edge-codec={}",
            {"qsgd": (QSGD.Settings,), "top-k": (TopK.Settings,)},
            lambda method, settings: [
                method.chosen(settings, "codec"),
                settings.of(CodecSettings).edge_codec,
            ],
        ),
        Axis(
            "augment={}",
            {"faug": (FAugSettings,)},
            lambda method, settings: [settings.of(AugmentSettings).augment],
            lambda method, settings: f"augment={settings.of(AugmentSettings).augment}",
        ),
        Axis(
            "{} models",
            {"diffusion": (DiffusionSettings,)},
            lambda method, settings: [task_of(settings.model)],
            lambda method, settings: f"model={settings.model}",
        ),
        Axis(
            "dp-sgd-noise, dp-sgd-epsilon or update-noise",
            {"private": (DeltaSettings,)},
            lambda method, settings: ["private"] if settings.of(PrivacySettings).private else [],
        ),
        Axis(
            "fedktl with generator={}:…",
            {"espalier": (DenoisingSettings,), "sd": (DenoisingSettings, PromptSettings, TrustSettings)}
            | dict.fromkeys(PICKLED, (TrustSettings,)),
            lambda method, settings: [settings.of(GeneratorSettings).generator.partition(":")[0]],
        ),
    )


def all_groups(methods: Iterable[type[Method]]) -> Groups:
    """Return the groups of every run, of all axes and of the methods, each once, in this order."""
    found = dict.fromkeys(COMMON)
    found |= dict.fromkeys(group for axis in axes() for uses in axis.uses.values() for group in uses)
    found |= dict.fromkeys(group for method in methods for group in method.uses)
    return tuple(found)


def used_groups(method: type[Method], settings: RunSettings) -> frozenset[type[SettingsGroup]]:
    """Return the groups whose settings a run uses."""
    used: set[type[SettingsGroup]] = {CoreSettings, *COMMON, *method.uses}
    for axis in axes():
        for choice in axis.chosen(method, settings):
            used.update(axis.uses.get(choice, ()))
    return frozenset(used)


def unused_settings(
    methods: Mapping[str, type[Method]], settings: RunSettings
) -> dict[str, tuple[type[SettingsGroup], str]]:
    """Return the settings that differ from their defaults although the run does not use them.

    Parameters
    ----------
    methods : mapping of str to type of Method
        The registered methods by name.
    settings : RunSettings
        The settings of the run.

    Returns
    -------
    dict of str to (type of SettingsGroup, str)
        The group and the error line of each setting, by field name.
    """
    method = methods[settings.method]
    used = used_groups(method, settings)
    return {
        field: (group, f"{key_of(field)}: {_foreign(group, methods, method, settings)}")
        for group in settings.groups()
        if group not in used
        for field, info in group.model_fields.items()
        if getattr(settings.of(group), field) != info.default
    }


def _foreign(
    group: type[SettingsGroup],
    methods: Mapping[str, type[Method]],
    method: type[Method],
    settings: RunSettings,
) -> str:
    """Return whose a group of settings is, and what to do about one that is set without being used."""
    owners, runs = [], []
    if names := [name for name, other in methods.items() if group in other.uses]:
        owners.append(_listed(names, "and"))
        runs.append(f"method={method.name}")
    for axis in axes():
        if choices := [choice for choice, uses in axis.uses.items() if group in uses]:
            owners.append(axis.owner.replace("{}", _listed(choices, "or")))
            runs.append(axis.run(method, settings))
    verb = "does" if len(runs) == 1 else "do"
    return f"a setting of {' and '.join(owners)}, which {' and '.join(runs)} {verb} not use; remove it"


def _listed(words: list[str], last: str) -> str:
    return f" {last} ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
