"""What cannot be combined is refused before a run starts, by a line that names the key and the way out."""

from __future__ import annotations

from typing import Any

import pytest

from espalier.errors import ConfigError
from espalier.methods.registry import METHODS
from espalier.methods.run_config import RunConfig
from espalier.models.presets import MODELS, family_of, task_of
from espalier.training.privacy import PrivacySettings

CLASSIFIER = {"model": "cnn"}
AVERAGED = {"method": "fedavg", **CLASSIFIER}
NOISY = {"update-clip": 1.0, "update-noise": 1.0}


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({"method": "cfl", **CLASSIFIER, "fraction": 0.5}, "fraction", "all clients"),
        ({"method": "cfl", **CLASSIFIER, "selection": "pow-d"}, "fraction", "selection=uniform"),
        ({"method": "cfl", **CLASSIFIER, "codec": "qsgd"}, "codec", "cosines"),
        ({"method": "cfl", **CLASSIFIER, "ema-decay": 0.9}, "ema-decay", "several models"),
        ({"method": "ifca", **CLASSIFIER, "ema-decay": 0.9}, "ema-decay", "several models"),
        ({"method": "ifca", **CLASSIFIER, "clusters": 1}, "clusters", "at least 2"),
        ({"method": "scaffold", **CLASSIFIER, "optimizer": "adam"}, "optimizer", "sgd"),
        ({"method": "scaffold", **CLASSIFIER, "momentum": 0.9}, "momentum", "0"),
        ({"method": "scaffold", **CLASSIFIER, "weight-decay": 0.1}, "momentum", "0"),
        ({"method": "qfedavg", **CLASSIFIER, "optimizer": "adam"}, "optimizer", "sgd"),
        ({"method": "qfedavg", **CLASSIFIER, "weighting": "samples"}, "weighting", "auto"),
        ({"method": "heterofl", "model": "unet-tiny"}, "model", "cnn"),
        ({"method": "heterofl", "model": "depth-cnn"}, "model", "cnn-bn"),
        (
            {"method": "heterofl", "model": "cnn-bn", "histogram-epsilon": 1.0},
            "histogram-epsilon",
            "masked-loss=false",
        ),
        ({"method": "heterofl", "model": "cnn-bn", "levels": "0.5,0.25"}, "levels", "largest must be 1"),
        (
            {"method": "heterofl", "model": "cnn-bn", "selection": "divfl"},
            "selection",
            "gradients of the whole network",
        ),
        ({"method": "depthfl", "model": "cnn"}, "model", "depth-cnn"),
        ({"method": "inclusivefl", "model": "mlp"}, "model", "depth-resnet18"),
        ({"method": "split-mix", **CLASSIFIER, "base-width": 0.3}, "base-width", "0.25"),
        ({"method": "split-mix", "model": "depth-cnn"}, "model", "mlp"),
        ({"method": "fedphd", **CLASSIFIER}, "model", "unet-tiny"),
        ({"method": "feddiffuse", **CLASSIFIER}, "model", "unet-small"),
        ({"method": "feddiffuse", "exchange": "udec", "ema-decay": 0.9}, "ema-decay", "whole model"),
        ({"method": "phoenix", "personal-layers": "conv_in", "ema-decay": 0.9}, "ema-decay", "whole model"),
        ({"method": "phoenix", "shared-data": "digits"}, "shared-count", "shared-count=100"),
        ({"method": "fedphd", "rounds": 5, "prune-at": 9}, "prune-at", "at most 5"),
        ({**AVERAGED, "dp-sgd-noise": 1.0, "dp-sgd-epsilon": 1.0}, "dp-sgd-epsilon", "one of the two"),
        ({**AVERAGED, "dp-sgd-noise": 1.0, "clip-norm": 0.0}, "clip-norm", "clip-norm=1"),
        ({**AVERAGED, "dp-sgd-noise": 1.0, "precision": "bf16"}, "precision", "fp32"),
        ({**AVERAGED, "dp-sgd-noise": 1.0, "augment": "faug"}, "augment", "uploads images"),
        ({**AVERAGED, "dp-sgd-noise": 1.0, "selection": "pow-d"}, "selection", "losses"),
        ({**AVERAGED, "update-noise": 1.0}, "update-clip", "update-clip=1"),
        ({**AVERAGED, **NOISY, "selection": "divfl"}, "selection", "gradients"),
        ({**AVERAGED, "update-clip": 1.0, "selection": "divfl"}, "update-clip", "received weights"),
        ({"method": "fedavg", "model": "cnn-bn", "dp-sgd-noise": 1.0}, "model", "logistic, mlp, cnn, cnn4"),
        ({"method": "fedavg", "model": "resnet10", **NOISY}, "model", "cnn4"),
        ({"method": "moon", **CLASSIFIER, "dp-sgd-noise": 1.0}, "dp-sgd-noise", "update-noise"),
        ({"method": "fjord", **CLASSIFIER, "dp-sgd-noise": 1.0}, "dp-sgd-noise", "per-image losses"),
        ({"method": "ifca", **CLASSIFIER, "dp-sgd-noise": 1.0}, "dp-sgd-noise", "which cluster"),
        ({"method": "qfedavg", **CLASSIFIER, **NOISY}, "update-noise", "its loss"),
        ({"method": "phoenix", "dp-sgd-noise": 1.0}, "dp-sgd-noise", "its loss"),
        ({"method": "fd", **CLASSIFIER, "dp-sgd-noise": 1.0}, "dp-sgd-noise", "network of its own"),
        ({"method": "fedproto", **CLASSIFIER, "update-clip": 1.0}, "update-clip", "received weights"),
        ({"method": "heterofl", **CLASSIFIER, "dp-sgd-noise": 1.0}, "dp-sgd-noise", "masked-loss=false"),
        ({"method": "feddiffuse", **NOISY, "eval-clients": True}, "eval-clients", "false"),
    ],
)
def test_refused(settings: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        RunConfig.from_flat(settings)
    lines = [line.strip() for line in str(refusal.value).splitlines()[1:]]
    assert any(line.startswith(key + ":") and words in line for line in lines), lines


@pytest.mark.parametrize(
    "settings",
    [
        {**AVERAGED, "dp-sgd-noise": 1.0, "codec": "qsgd", "histogram-epsilon": 1.0},
        {**AVERAGED, "dp-sgd-epsilon": 1.0, **NOISY},
        {"method": "fedphd", "dp-sgd-noise": 1.0, "histogram-epsilon": 1.0},
        {"method": "scaffold", **CLASSIFIER, **NOISY},
        {"method": "moon", "model": "unet-tiny", **NOISY},
        {"method": "heterofl", **CLASSIFIER, "dp-sgd-noise": 1.0, "masked-loss": False},
        {"method": "fedavg", "model": "cnn-bn", "histogram-epsilon": 1.0, "update-clip": 1.0},
    ],
)
def test_private_runs_that_are_taken(settings: dict[str, Any]) -> None:
    assert RunConfig.from_flat(settings).of(PrivacySettings).private == any(
        s in settings for s in ("dp-sgd-noise", "dp-sgd-epsilon", "update-noise")
    )


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("model", sorted(MODELS))
def test_a_method_takes_exactly_the_models_it_says(method: str, model: str) -> None:
    """And every method takes some model with all other settings at their defaults."""
    kind = METHODS[method]
    fits = task_of(model) in kind.tasks and (not kind.families or family_of(model) in kind.families)
    if fits:
        assert RunConfig.from_flat({"method": method, "model": model}).model == model
    else:
        with pytest.raises(ConfigError, match=f"model: {model} does not go with method={method}"):
            RunConfig.from_flat({"method": method, "model": model})


def test_every_method_takes_some_model() -> None:
    for kind in METHODS.values():
        assert any(
            task_of(m) in kind.tasks and (not kind.families or family_of(m) in kind.families) for m in MODELS
        )
