"""The run configuration: its defaults, its refusals and its way through a plan."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Mapping
from typing import Any, cast

import pytest
from google.protobuf.struct_pb2 import Struct
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from espalier.config.assignments import parse_assignments
from espalier.errors import ConfigError
from espalier.methods.fedphd import FedPhD, prune_round
from espalier.methods.run_config import CLOUD_ONLY, RunConfig
from espalier_server import FLOWER_APP
from tests.support.paths import ROOT


def types(flat: Mapping[str, object]) -> dict[str, type]:
    return {key: type(value) for key, value in flat.items()}


def faults(**settings: object) -> list[str]:
    """Lines of the error that flat settings give, without the head line."""
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flat({key.replace("_", "-"): value for key, value in settings.items()})
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_the_flower_app_holds_the_defaults() -> None:
    table = tomllib.loads((FLOWER_APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    expected = RunConfig().to_flat()
    assert table == expected
    assert list(table) == list(expected)
    assert types(table) == types(expected)


def test_defaults_are_valid() -> None:
    assert RunConfig.from_flat({}) == RunConfig.from_flat(RunConfig().to_flat())


def test_it_is_frozen() -> None:
    config = RunConfig()
    with pytest.raises(ValidationError):
        setattr(config, "rounds", 3)  # noqa: B010 - a plain assignment does not type-check


@pytest.mark.parametrize(("rounds", "rg", "windows"), [(60, 5, 12), (61, 5, 13), (1, 5, 1), (6, 1, 6)])
def test_windows(rounds: int, rg: int, windows: int) -> None:
    assert RunConfig(rounds=rounds, rg=rg).windows == windows


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("roundz", 5, ["roundz: unknown setting", '"rounds"']),
        ("rounds", "5", ["rounds:", "a text", "a whole number is expected", "rounds=60"]),
        ("rounds", 2.5, ["rounds: 2.5", "whole number"]),
        ("rounds", True, ["rounds: true", "whole number"]),
        ("rounds", 0, ["rounds: 0", "at least 1"]),
        ("rg", -1, ["rg: -1", "at least 1"]),
        ("flip", 1, ["flip: 1", "true or false"]),
        ("fraction", 0, ["fraction: 0", "above 0"]),
        ("fraction", 1.5, ["fraction: 1.5", "at most 1"]),
        ("learning-rate", -1, ["learning-rate: -1", "at least 0"]),
        ("learning-rate", float("nan"), ["learning-rate: nan", "finite"]),
        ("pruning-ratio", 1, ["pruning-ratio: 1", "(0, 1)", "0 (no pruning)"]),
        ("pruning-ratio", -0.1, ["pruning-ratio: -0.1", "(0, 1)"]),
        ("ema-decay", 1.0, ["ema-decay: 1.0", "below 1"]),
        ("method", "fedpdh", ['method: "fedpdh"', "fedphd", 'did you mean "fedphd"?']),
        ("edge-choice", "rnadom", ['edge-choice: "rnadom"', "random", 'did you mean "random"?']),
        ("features", "vgg", ['features: "vgg"', "classifier, inception"]),
        ("device", "gpu", ['device: "gpu"', "cuda:N"]),
        ("model", "", ["model: is empty"]),
        ("run-id", "../../etc", ["run-id:", "letters, digits"]),
        ("beta-start", 0.5, ["beta-start: 0.5", "beta-end (0.02)"]),
        ("sample-steps", 2000, ["sample-steps: 2000", "timesteps (1000)"]),
        ("prune-at", 61, ["prune-at: round 61", "rounds=60", "pruning-ratio=0"]),
    ],
)
def test_refusals_say_what_where_and_how(key: str, value: object, parts: list[str]) -> None:
    (line,) = faults(**{key: value})
    for part in parts:
        assert part in line


#: Settings of the weight-exchange methods: a value just out of range, and how its line says to mend it.
OUT_OF_RANGE: list[tuple[str, object, str]] = [
    ("local-steps", -1, "it must be at least 0"),
    ("local-steps", 1.5, "a whole number is expected, e.g. local-steps=0"),
    ("optimizer", "sdg", 'auto, adam, sgd; did you mean "sgd"?'),
    ("learning-rate-decay", 0, "it must be above 0"),
    ("learning-rate-decay", 1.01, "it must be at most 1"),
    ("momentum", -0.1, "it must be at least 0"),
    ("momentum", 1, "it must be below 1"),
    ("weight-decay", -1e-9, "it must be at least 0"),
    ("selection", "pow", 'divfl; did you mean "'),
    ("candidates", -1, "it must be at least 0"),
    ("adaptive-candidates", "yes", "true or false is expected, e.g. adaptive-candidates=false"),
    ("divfl-gradients", "fresh", "is none of ideal, no-overhead"),
    ("divfl-greedy", "lasy", 'greedy, lazy, stochastic; did you mean "lazy"?'),
    ("weighting", "sample", 'auto, samples, uniform; did you mean "samples"?'),
    ("edge-choice", "shapes", 'did you mean "shape"?'),
    ("shape-diversity", -1, "it must be at least 0"),
    ("shape-edges", -1, "it must be at least 0"),
    ("prox-mu", -0.01, "it must be at least 0"),
    ("moon-mu", -1, "it must be at least 0"),
    ("moon-temperature", 0, "it must be above 0"),
    ("dyn-alpha", 0, "it must be above 0"),
    ("server-rate", 0, "it must be above 0"),
    ("fairness-q", -0.5, "it must be at least 0"),
    ("levels", "", 'is not a share in (0, 1]; give numbers such as "1,0.5,0.25"'),
    ("levels", "1,half", '"half" in "1,half" is not a share in (0, 1]; give numbers'),
    ("levels", "1,0", '"0" in "1,0" is not a share'),
    ("levels", "1.5,1", '"1.5" in "1.5,1" is not a share'),
    ("levels", "nan", "is not a share"),
    ("levels", "0.5,1", 'does not descend; write "1,0.5"'),
    ("levels", "1,1,0.5", 'does not descend; write "1,0.5"'),
    ("level-choice", "memroy", 'did you mean "memory"?'),
    ("dynamic-levels", 1, "true or false is expected"),
    ("masked-loss", 0, "true or false is expected, e.g. masked-loss=true"),
    ("width-scaler", "on", "true or false is expected"),
    ("distillation", 1, "true or false is expected"),
    ("inclusive-beta", -0.1, "it must be at least 0"),
    ("inclusive-beta", 1.1, "it must be at most 1"),
    ("base-width", 0, "it must be above 0"),
    ("base-width", 1.5, "it must be at most 1"),
    ("clusters", 0, "it must be at least 1"),
    ("shared-layers", 3, "a text is expected"),
    ("cfl-mean-norm", 0, "it must be above 0"),
    ("cfl-max-norm", 0, "it must be above 0"),
    ("cfl-from-round", 0, "it must be at least 1"),
    ("cfl-linkage", "complet", 'single, complete; did you mean "complete"?'),
    ("exchange", "split", 'full, usplit, ulatdec, udec; did you mean "usplit"?'),
    ("shared-data", False, "a text is expected"),
    ("shared-count", -1, "it must be at least 0"),
    ("personal-layers", 1.5, "a text is expected"),
    ("quality-threshold", -1, "it must be at least 0"),
    ("codec", "topk", 'did you mean "top-k"?'),
    ("codec-levels", 0, "it must be at least 1"),
    ("codec-levels", 2**23, "it must be at most 8388607"),
    ("codec-norm", "tensors", 'whole, tensor; did you mean "tensor"?'),
    ("codec-keep", 0, "it must be above 0"),
    ("codec-keep", 1.01, "it must be at most 1"),
    ("eval-clients", "true", "true or false is expected, e.g. eval-clients=false"),
]


@pytest.mark.parametrize(("key", "value", "mend"), OUT_OF_RANGE)
def test_settings_out_of_range_are_named(key: str, value: object, mend: str) -> None:
    (line,) = faults(**{key: value})
    assert line.startswith(f"{key}: ")
    assert mend in line
    struct = Struct()
    struct.update(cast(Any, {key: value}))
    with pytest.raises(ConfigError, match=f"  {key}: "):
        RunConfig.from_struct(struct)


def test_no_setting_is_without_a_bound() -> None:
    """A number no setting can take, a text where a number belongs and the reverse: one line that names the key."""
    for key, default in RunConfig().to_flat().items():
        bad: list[object] = ["", float("nan")] if isinstance(default, int | float) else [7]
        if isinstance(default, int | float) and key not in UNBOUNDED:
            bad += [-1e9] if not isinstance(default, bool) else [-1]
        for value in bad:
            (line,) = faults(**{key: value})
            assert line.startswith(f"{key}: "), line
            assert any(word in line for word in ("expected, e.g.", "must be", "give", "none of")), line


#: Settings that may be any number.
UNBOUNDED = {"selection-a", "selection-b", "aggregation-a", "aggregation-b"}

#: Combinations that make no sense: settings, the key that is blamed, and how to mend it.
CONTRADICTIONS: list[tuple[dict[str, object], str, str]] = [
    ({"method": "ifca"}, "model", "unet-tiny does not go with method=ifca; use "),
    ({"method": "heterofl", "model": "unet-tiny"}, "model", "does not go with method=heterofl"),
    ({"method": "fedphd", "model": "cnn"}, "model", "use unet"),
    ({"method": "heterofl", "model": "cnn", "levels": "0.5,0.25"}, "levels", "add it, e.g. 1,0.5"),
    ({"method": "fjord", "model": "cnn", "selection": "divfl"}, "selection", "use pow-d or uniform"),
    (
        {"method": "heterofl", "model": "cnn", "histogram-epsilon": 1},
        "histogram-epsilon",
        "masked-loss=false",
    ),
    ({"method": "scaffold", "model": "cnn", "optimizer": "adam"}, "optimizer", "optimizer=sgd"),
    ({"method": "scaffold", "model": "cnn", "momentum": 0.9}, "momentum", "set both to 0"),
    ({"method": "qfedavg", "model": "cnn", "weighting": "samples"}, "weighting", "leave it at auto"),
    ({"method": "cfl", "model": "cnn", "fraction": 0.5}, "fraction", "set fraction=1"),
    ({"method": "cfl", "model": "cnn", "codec": "qsgd"}, "codec", "set codec=none or fp16"),
    ({"method": "split-mix", "model": "cnn", "base-width": 0.3}, "base-width", "0.5, 0.25, 0.125"),
    ({"method": "ifca", "model": "cnn", "ema-decay": 0.9}, "ema-decay", "set ema-decay=0"),
    ({"method": "phoenix", "shared-data": "digits"}, "shared-count", "set e.g. shared-count=100"),
    ({"method": "feddiffuse", "exchange": "udec", "ema-decay": 0.9}, "ema-decay", "set it to 0"),
]


@pytest.mark.parametrize(("settings", "key", "mend"), CONTRADICTIONS)
def test_what_does_not_go_together_says_how_to_mend_it(
    settings: dict[str, object], key: str, mend: str
) -> None:
    (line,) = faults(**settings)
    assert line.startswith(f"{key}: ")
    assert mend in line


def test_all_faults_are_told_at_once() -> None:
    lines = faults(rounds="x", rg=0, nonsense=1)
    assert [line.split(":")[0] for line in lines] == ["nonsense", "rounds", "rg"]


def test_pruning_round_matters_only_where_something_is_pruned() -> None:
    late = RunConfig.from_flat({"rounds": 5, "prune-at": 9, "pruning-ratio": 0})
    assert late.of(FedPhD.SparseTraining).prune_at == 9
    assert prune_round(RunConfig.from_flat({"rounds": 20, "prune-at": 20})) == 20


def test_prune_round_left_open_is_a_third_of_the_rounds() -> None:
    assert [prune_round(RunConfig.from_flat({"rounds": r})) for r in (1, 2, 30, 60)] == [1, 1, 10, 20]


def test_numbers_are_read_generously_where_nothing_is_lost() -> None:
    config = RunConfig.from_flat({"rounds": 30.0, "learning-rate": 1})
    assert config.rounds == 30
    assert isinstance(config.rounds, int)
    assert config.learning_rate == 1.0


@given(
    st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**53),
            "rounds": st.integers(20, 10**6),
            "fraction": st.floats(0, 1, exclude_min=True),
            "learning-rate": st.floats(1e-12, 1e3),
            "flip": st.booleans(),
            "edge-choice": st.sampled_from(["homogeneity", "random", "fixed"]),
        }
    )
)
def test_a_plan_brings_the_settings_over_unchanged(flat: dict[str, object]) -> None:
    config = RunConfig.from_flat(flat)
    struct = Struct.FromString(config.to_struct().SerializeToString())
    received = RunConfig.from_struct(struct)
    assert received == config
    assert {k: type(v) for k, v in received.to_flat().items()} == {
        k: type(v) for k, v in config.to_flat().items()
    }


def test_a_plan_leaves_out_places_on_the_clouds_machine() -> None:
    config = RunConfig.from_flat({"out": "/somewhere/private", "eval-data": "/data/secret"})
    assert CLOUD_ONLY.isdisjoint(config.to_struct().fields)
    assert "somewhere" not in str(config.to_struct())


def test_a_received_plan_is_validated() -> None:
    struct = Struct()
    struct.update({"rounds": "many"})
    with pytest.raises(ConfigError, match="rounds"):
        RunConfig.from_struct(struct)
    struct = Struct()
    struct.update({"rounds": {"nested": 1}})
    with pytest.raises(ConfigError, match="rounds"):
        RunConfig.from_struct(struct)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("k=5", 5),
        ("k = 5.0", 5.0),
        ("k=1e-4", 1e-4),
        ("k=true", True),
        ('k="5"', "5"),
        ("k=digits:2/8", "digits:2/8"),
        ("k=a b", "a b"),
        ("k=", ""),
        ("k=a=b", "a=b"),
        ("k=1\nj=2", "1\nj=2"),
    ],
)
def test_assignments(word: str, value: object) -> None:
    parsed = parse_assignments([word])
    assert parsed == {"k": value}
    assert type(parsed["k"]) is type(value)


def test_the_last_assignment_wins() -> None:
    assert parse_assignments(["k=1", "k=2"]) == {"k": 2}


@pytest.mark.parametrize("word", ["rounds", "=5", "k=[1, 2]", "k={a=1}", "k=2026-01-01"])
def test_words_that_are_no_setting(word: str) -> None:
    with pytest.raises(ConfigError, match="-c"):
        parse_assignments([word])


def test_common_run_needs_no_torch() -> None:
    modules = sorted(path.stem for path in (ROOT / "common" / "run").glob("*.py") if path.stem != "__init__")
    program = f"import sys\nfor m in {modules!r}: __import__('espalier.config.' + m)\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_a_plan_says_only_what_departs_from_the_defaults() -> None:
    """A client of FD sends 400 bytes a round: the settings that reach it must not weigh thousands."""
    config = RunConfig.from_flat({"method": "fd", "model": "cnn", "rounds": 7})
    struct = config.to_struct()
    assert set(struct.fields) == {"method", "model", "rounds", "defaults"}
    assert struct.ByteSize() < 200


def test_a_plan_of_other_defaults_is_refused() -> None:
    struct = RunConfig.from_flat({"rounds": 7}).to_struct()
    struct.update({"defaults": "0123456789abcdef"})
    with pytest.raises(ConfigError, match="default settings are not this side's; install the same version"):
        RunConfig.from_struct(struct)
