"""A setting that the method, task or axis of a run does not use is refused, by a line that names its owners."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.config.core import CoreSettings
from espalier.config.fields import FlatValue, SettingsGroup, key_of
from espalier.config.run_settings import keys_of
from espalier.errors import ConfigError
from espalier.methods.axes import COMMON, all_groups, axes, unused_settings, used_groups
from espalier.methods.divfl import FacilityLocation
from espalier.methods.power_of_choice import PowD
from espalier.methods.registry import METHODS
from espalier.methods.run_config import RunConfig, with_defaults
from espalier.models.presets import MODELS, family_of, task_of
from espalier.wire.compression import QSGD, TopK

#: Another valid value of the settings of which no other one follows from type and default.
OTHER: dict[str, FlatValue] = {
    "levels": "1,0.5",
    "shared-layers": "conv",
    "personal-layers": "conv_in",
    "families": "mlp,cnn",
    "shared-data": "digits",
    "generator": "gan:x",
    "prompt": "a dog",
}


def model_for(method: str) -> str:
    """Return the first model that a method takes."""
    kind = METHODS[method]
    return next(
        m for m in MODELS if task_of(m) in kind.tasks and (not kind.families or family_of(m) in kind.families)
    )


def other_value(group: type[SettingsGroup], field: str) -> FlatValue:
    """Return a valid value that is not the default."""
    info = group.model_fields[field]
    key, default = key_of(field), info.default
    if key in OTHER:
        return OTHER[key]
    if isinstance(default, bool):
        return not default
    if isinstance(default, str):
        return str(next(choice for choice in get_args(info.annotation) if choice != default))
    if isinstance(default, int):
        return default + 1
    return float(default) / 2 or 0.25


PAIRS = [
    (method, group, field)
    for method in sorted(METHODS)
    for group in RunConfig.groups()
    if group not in used_groups(METHODS[method], RunConfig(method=method, model=model_for(method)))
    for field in group.model_fields
]


@given(st.sampled_from(PAIRS))
def test_a_foreign_setting_is_refused_with_its_owners(
    pair: tuple[str, type[SettingsGroup], str],
) -> None:
    method, group, field = pair
    flat: dict[str, Any] = {"method": method, "model": model_for(method)}
    key, value = key_of(field), other_value(group, field)
    with pytest.raises(ConfigError) as refusal:
        RunConfig.from_flat({**flat, key: value})
    (line,) = [
        text.strip() for text in str(refusal.value).splitlines() if text.strip().startswith(f"{key}: ")
    ]
    assert line.startswith(f"{key}: a setting of ")
    assert line.endswith(" not use; remove it")
    for owner, kind in METHODS.items():
        if group in kind.uses:
            assert owner in line
    # The default is what `flwr run` hands over for a key that was not given.
    assert RunConfig.from_flat({**flat, key: group.model_fields[field].default}) == RunConfig(**flat)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_methods_own_settings_are_taken(method: str) -> None:
    flat = {"method": method, "model": model_for(method)}
    for group in METHODS[method].uses:
        for field in group.model_fields:
            settings, faults = RunConfig.parse({**flat, key_of(field): other_value(group, field)})
            assert not faults
            assert settings is not None
            assert unused_settings(METHODS, settings) == {}


@pytest.mark.parametrize(
    ("flat", "line"),
    [
        (
            {"method": "fedavg", "clusters": 7},
            "clusters: a setting of ifca, which method=fedavg does not use; remove it",
        ),
        (
            {"method": "fedavg", "dyn-alpha": 0.2},
            "dyn-alpha: a setting of feddyn and depthfl, which method=fedavg does not use; remove it",
        ),
        (
            {"method": "scaffold", "candidates": 3},
            "candidates: a setting of selection=cpow-d, pow-d or rpow-d, which selection=uniform does not use; "
            "remove it",
        ),
        (
            {"method": "fedavg", "selection-a": 3.0},
            "selection-a: a setting of edge-choice=homogeneity, which edge-choice=random does not use; remove it",
        ),
        (
            {"method": "fedavg", "model": "cnn", "timesteps": 100},
            "timesteps: a setting of diffusion models, which model=cnn does not use; remove it",
        ),
        (
            {"method": "fedavg", "codec-keep": 0.1},
            "codec-keep: a setting of codec=top-k or edge-codec=top-k, which this run does not use; remove it",
        ),
        (
            {"method": "fedavg", "dp-delta": 0.1},
            "dp-delta: a setting of dp-sgd-noise, dp-sgd-epsilon or update-noise, which this run does not use; "
            "remove it",
        ),
        (
            {"method": "fedktl", "model": "cnn", "generator": "gan:x", "prompt": "a dog"},
            "prompt: a setting of fedktl with generator=sd:…, which this run does not use; remove it",
        ),
    ],
)
def test_the_line_names_owner_and_run(flat: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        RunConfig.from_flat(flat)
    assert line in [text.strip() for text in str(refusal.value).splitlines()]


@pytest.mark.parametrize(
    "flat",
    [
        {"method": "power-of-choice", "model": "cnn", "candidates": 3},
        {"method": "scaffold", "model": "cnn", "selection": "rpow-d", "loss-weight": "samples"},
        {"method": "divfl", "model": "cnn", "divfl-greedy": "greedy"},
        {"method": "fedpaq", "model": "cnn", "codec-levels": 3},
        {"method": "fedavg", "model": "cnn", "edge-codec": "top-k", "codec-keep": 0.1},
        {"method": "fedavg", "edge-choice": "homogeneity", "selection-a": 3.0},
        {"method": "fedavg", "edge-choice": "shape", "shape-edges": 1},
        {"method": "fedavg", "dp-sgd-noise": 1.0, "dp-delta": 1e-6},
        {"method": "fd", "model": "cnn", "augment": "faug", "faug-seeds": 3},
        {"method": "fedktl", "model": "cnn", "generator": "sd:x", "prompt": "a dog", "trust-pickle": True},
        {"method": "fedavg", "sample-steps": 3},
    ],
)
def test_an_axis_takes_its_settings_with_any_method(flat: dict[str, Any]) -> None:
    config = RunConfig.from_flat(flat)
    assert {key: config.to_flat()[key] for key in flat} == flat


def test_every_setting_has_one_owner_or_belongs_to_every_run() -> None:
    owned = {g for m in METHODS.values() for g in m.uses}
    chosen = {g for axis in axes() for uses in axis.uses.values() for g in uses}
    assert not owned & chosen
    assert not (owned | chosen) & {CoreSettings, *COMMON}
    assert set(all_groups(METHODS.values())) == owned | chosen | set(COMMON)
    for group in (FacilityLocation.Settings, PowD.Settings, QSGD.Settings, TopK.Settings):
        assert group in chosen


def test_every_setting_says_in_a_line_what_it_is() -> None:
    for key, (group, field) in keys_of(RunConfig.groups()).items():
        description = group.model_fields[field].description
        assert description, key
        assert "\n" not in description


def test_a_record_of_an_earlier_version_loses_what_its_run_did_not_use() -> None:
    recorded = {**RunConfig(method="fedavg", model="cnn").to_flat(), "clusters": 7, "prox-mu": 0.5}
    assert RunConfig.from_record(recorded) == RunConfig(method="fedavg", model="cnn")


def test_a_plan_without_places_at_the_cloud_is_read_as_it_was_meant() -> None:
    """The kind of generator decides about `prompt`, and its place never leaves the cloud."""
    flat = {"method": "fedktl", "model": "cnn", "generator": "sd:/there", "prompt": "a dog"}
    received = RunConfig.from_struct(RunConfig.from_flat(flat).to_struct())
    assert received == RunConfig(method="fedktl", model="cnn", prompt="a dog")


def test_defaults_of_a_caller_fit_what_was_chosen() -> None:
    demo = {"rounds": 6, "sample-steps": 2, "candidates": 3}
    assert with_defaults(demo, {"model": "cnn", "method": "fedavg"}) == {
        "rounds": 6,
        "model": "cnn",
        "method": "fedavg",
    }
    assert with_defaults(demo, {"selection": "pow-d", "rounds": 2}) == {
        **demo,
        "selection": "pow-d",
        "rounds": 2,
    }
    # What was given is never dropped, so it is refused where it is not used.
    assert with_defaults({}, {"model": "cnn", "method": "fedavg", "clusters": 3})["clusters"] == 3
