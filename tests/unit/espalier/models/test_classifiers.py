from __future__ import annotations

import subprocess
import sys
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from espalier.errors import ConfigError
from espalier.methods.run_config import RunConfig
from espalier.models.architecture import FAMILIES, build, build_with, describe, is_reduced
from espalier.models.bases import members
from espalier.models.classifiers import CNN, MLP
from espalier.models.exits import ExitNetwork
from espalier.models.initial import initial_bases, initial_model
from espalier.models.layers import BatchNorm, Classifier
from espalier.models.presets import MODELS, PRESETS, is_model, is_output_tensor, task_of
from espalier.models.statistics import Statistics, batch_statistics, with_statistics
from espalier_proto import espalier_pb2 as pb
from espalier_server.evaluation.cost import macs_and_params
from tests.support.networks import images, over_the_wire, parameter_count
from tests.support.paths import ROOT

#: The networks of the family "backbone", some of them large, have their own tests in test_families.py.
CLASSIFIERS = [n for n in MODELS if task_of(n) == "classification" and PRESETS[n].family != "backbone"]
SMALL = [name for name in CLASSIFIERS if "resnet" not in name]


def model(name: str, shape: tuple[int, int, int] = (1, 8, 8), classes: int = 10, **more: Any) -> Classifier:
    return cast(Classifier, initial_model(RunConfig(model=name), shape, classes, **more))


def made(family: str, **arguments: Any) -> Any:
    given = {"in_channels": 1, "sample_size": 8, "classes": 3} | arguments
    torch.manual_seed(7)
    return FAMILIES[family].construct(given)


# --- names -------------------------------------------------------------------------------------


def test_the_names_are_known_without_torch() -> None:
    code = "import sys, espalier.models.presets, espalier.config.run_settings; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_presets_say_their_task_and_families_exist() -> None:
    assert task_of("unet-small") == "diffusion"
    assert task_of("cnn-bn") == "classification"
    assert is_model("logistic")
    assert not is_model("logistics")
    assert {preset.family for preset in PRESETS.values()} <= set(FAMILIES)
    assert all(MODELS.values())


def test_an_unknown_model_is_refused_with_the_one_meant() -> None:
    with pytest.raises(ConfigError, match=r'model: "unet_tny" is none of .*did you mean "unet-tiny"'):
        RunConfig.from_flat({"model": "unet_tny"})


@pytest.mark.parametrize(
    ("shape", "classes", "projection", "name", "message"),
    [
        ((1, 8, 9), 10, 0, "cnn", "square images"),
        ((1, 7, 7), 10, 0, "cnn", "8 to 224 pixels, not 7"),
        ((1, 225, 225), 10, 0, "mlp", "not 225"),
        ((0, 8, 8), 10, 0, "cnn", "at least one channel"),
        ((1, 8, 8), 0, 0, "cnn", "at least 2 classes, not 0"),
        ((1, 8, 8), 10, 16, "unet-tiny", "no projection head"),
        ((1, 8, 8), 10, -1, "cnn", "'projection'"),
    ],
)
def test_what_a_model_cannot_take_is_said(
    shape: tuple[int, int, int], classes: int, projection: int, name: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        initial_model(RunConfig(model=name), shape, classes, projection)


def test_initial_weights_depend_on_the_seed_only() -> None:
    state = torch.random.get_rng_state()
    first, again = model("cnn"), model("cnn")
    other = initial_model(RunConfig(model="cnn", seed=5), (1, 8, 8), 10)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.state_dict()["conv1.weight"], other.state_dict()["conv1.weight"])


# --- sizes, by hand ----------------------------------------------------------------------------


def test_counts_of_the_small_networks() -> None:
    # 64 pixels x 10 classes and biases; one multiplication a weight.
    assert macs_and_params(model("logistic")) == (640, 650)
    assert macs_and_params(model("mlp")) == (64 * 64 + 64 * 30 + 30 * 10, 6316 + 64 + 30 + 10)
    # 8 px -> conv 16 -> 4 px -> conv 32 -> 2 px -> 128 values -> 64 -> 10.
    weights = {"conv1": 9 * 16, "conv2": 9 * 16 * 32, "hidden": 32 * 2 * 2 * 64, "classifier": 64 * 10}
    assert macs_and_params(model("cnn")) == (
        weights["conv1"] * 64 + weights["conv2"] * 16 + weights["hidden"] + weights["classifier"],
        sum(weights.values()) + 16 + 32 + 64 + 10,
    )


def test_the_resnet_has_its_known_number_of_parameters() -> None:
    def block(before: int, width: int, changes: bool) -> int:
        convolutions = 9 * before * width + 9 * width * width
        return convolutions + 2 * before + 2 * width + (before * width if changes else 0)

    total, before = 9 * 3 * 64, 64
    for width in (64, 128, 256, 512):
        total += block(before, width, changes=before != width) + block(width, width, changes=False)
        before = width
    total += 2 * 512 + 512 * 10 + 10
    assert total == 11_172_170
    with torch.device("meta"):
        network = model("preact-resnet18", (3, 32, 32))
    assert parameter_count(network) == total


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("size", [8, 9, 28, 224])
def test_every_network_takes_every_size(name: str, size: int) -> None:
    with torch.device("meta"):
        network = model(name, (3, size, size), 7).eval()
        given = torch.empty(2, 3, size, size)
        assert network(given).shape == (2, 7)
        features = network.features(given)
    assert features.shape[0] == 2
    assert features.dim() == 2


# --- networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_a_rebuilt_network_computes_the_same(name: str) -> None:
    network = model(name, projection=6)
    with torch.no_grad():
        network(images(16))  # moves running statistics away from where they start
    rebuilt = build_with(over_the_wire(network), network.state_dict())
    assert rebuilt.training
    assert describe(rebuilt) == describe(network)
    assert not is_reduced(rebuilt)
    assert torch.equal(rebuilt.eval()(images(4)), network.eval()(images(4)))


@pytest.mark.parametrize("name", SMALL)
def test_a_step_of_training_reaches_every_parameter(name: str) -> None:
    network = model(name, (3, 28, 28), 4, projection=5)
    out = network(images(6, 3, 28))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    logits = out if isinstance(out, list) else [out]
    total = torch.stack([functional.cross_entropy(one, labels) for one in logits]).sum()
    total.backward()  # type: ignore[no-untyped-call]
    for path, parameter in network.named_parameters():
        assert parameter.grad is not None, path
        assert torch.isfinite(parameter.grad).all(), path


def test_the_mlp_is_what_its_definition_says() -> None:
    network: MLP = made("mlp", hidden=[4, 5], projection=2)
    t = network.state_dict()
    x = images(3).flatten(1)
    for layer in ("hidden1", "hidden2"):
        x = (x @ t[f"{layer}.weight"].T + t[f"{layer}.bias"]).clamp(min=0)
    assert torch.allclose(network.features(images(3)), x)
    z = (x @ t["projection.0.weight"].T + t["projection.0.bias"]).clamp(min=0)
    z = z @ t["projection.3.weight"].T + t["projection.3.bias"]
    assert z.shape == (3, 2)
    assert torch.allclose(network.project(images(3)), z, atol=1e-6)
    logits = z @ t["classifier.weight"].T + t["classifier.bias"]
    assert torch.allclose(network(images(3)), logits, atol=1e-6)


def test_without_a_head_the_projection_is_the_features() -> None:
    network = model("cnn")
    assert torch.equal(network.project(images(2)), network.features(images(2)))


def test_the_scaler_divides_in_training_only() -> None:
    plain: CNN = made("cnn", widths=[2], hidden=0)
    scaled: CNN = made("cnn", widths=[2], hidden=0, scale=0.25)
    scaled.load_state_dict(plain.state_dict())
    assert torch.allclose(scaled.train().features(images(2)), plain.features(images(2)) * 4)
    assert torch.equal(scaled.eval().features(images(2)), plain.features(images(2)))


def test_pooling_stops_at_one_pixel() -> None:
    # 8 -> 4 -> 2 -> 1, then two more convolutions of single pixels.
    network: CNN = made("cnn", widths=[2, 2, 2, 2, 2], hidden=3)
    assert network.state_dict()["hidden.weight"].shape == (3, 2)
    assert network(images(2)).shape == (2, 3)


def test_heterofls_network_averages_without_a_last_pooling() -> None:
    network: CNN = made("cnn", widths=[2], hidden=0)
    maps = functional.conv2d(images(2), network.state_dict()["conv1.weight"], padding=1)
    maps = (maps + network.state_dict()["conv1.bias"].view(1, 2, 1, 1)).clamp(min=0)
    assert torch.allclose(network.features(images(2)), maps.mean((2, 3)), atol=1e-6)


def test_output_tensors_have_a_row_per_class() -> None:
    for name in SMALL:
        tensors = model(name, classes=7, projection=4).state_dict()
        rows = {n: t.shape[0] for n, t in tensors.items() if is_output_tensor(n)}
        assert rows
        assert set(rows.values()) == {7}
        assert all(n.split(".")[-2] == "classifier" for n in rows)


# --- exits -------------------------------------------------------------------------------------


def test_exits_are_listed_in_training_and_averaged_in_evaluation() -> None:
    network = cast(ExitNetwork, model("depth-cnn"))
    trained = network.train()(images(5))
    assert [z.shape for z in trained] == [(5, 10)] * 3
    network.eval()
    each = network.exits(images(5))
    assert torch.allclose(network(images(5)), (each[0] + each[1] + each[2]) / 3, atol=1e-6)
    deepest = network.exit(3)
    assert torch.allclose(deepest.logits(network.features(images(5))), each[2], atol=1e-6)


def test_an_exit_weighs_its_maps_by_an_upsampled_gate() -> None:
    network = cast(ExitNetwork, model("depth-cnn")).eval()
    exit1, maps = network.exit(1), network.maps(images(2))[0]
    gate = cast(nn.Module, exit1.gate)(maps)
    assert gate.shape[-2:] == (4, 4)
    doubled = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)(gate)
    expected = exit1.bottlenecks(maps / (1 + torch.exp(-doubled))).mean((2, 3))
    assert torch.allclose(exit1.features(maps), expected, atol=1e-6)
    assert network.exit(3).gate is None


# --- normalisation -----------------------------------------------------------------------------


def test_static_normalisation_keeps_no_statistics_and_batch_does() -> None:
    static, batch = made("cnn", widths=[2], norm="static"), made("cnn", widths=[2], norm="batch")
    flags = {t.name: t.buffer for t in describe(batch).tensors if t.name.startswith("norm1")}
    assert flags == {
        "norm1.weight": False,
        "norm1.bias": False,
        "norm1.running_mean": True,
        "norm1.running_var": True,
        "norm1.num_batches_tracked": True,
    }
    assert batch.state_dict()["norm1.num_batches_tracked"].dtype == torch.int64
    assert not any(t.buffer for t in describe(static).tensors)
    # Batch statistics at evaluation too: an image's logits hang on its companions.
    static.eval()
    assert not torch.allclose(static(images(4))[:2], static(images(4)[:2]), atol=1e-4)


def test_normalisation_as_torchs_for_more_than_one_value() -> None:
    own, theirs = BatchNorm(3), nn.BatchNorm2d(3)
    maps = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(own(maps), theirs(maps))
    assert torch.equal(own.state_dict()["running_var"], theirs.state_dict()["running_var"])


def test_one_value_a_channel_does_not_break_training() -> None:
    lone = torch.tensor([[[[3.0]], [[-1.0]]]], requires_grad=True)
    static = BatchNorm(2, momentum=None, track_running_stats=False)
    static.bias.data[:] = torch.tensor([0.5, 2.0])
    out = static(lone)
    assert out.flatten().tolist() == [0.5, 2.0]
    out.sum().backward()
    assert lone.grad is not None
    assert lone.grad.abs().sum() == 0
    batch = BatchNorm(2)
    assert torch.allclose(batch(lone), lone / (1 + 1e-5) ** 0.5)
    assert batch.num_batches_tracked == 0
    network = model("depth-cnn")
    assert all(torch.isfinite(z).all() for z in network.train()(images(1)))


def test_statistics_are_means_over_batches_by_hand() -> None:
    network = made("cnn", widths=[2], hidden=0, norm="static").eval()
    batches = [images(n, seed=n) for n in (3, 5, 2)]
    kept = {n: t.clone() for n, t in network.state_dict().items()}
    (path, found), *rest = batch_statistics(network, batches).items()
    assert not rest
    assert path == "norm1"
    seen = [network.conv1(b).detach().double().numpy() for b in batches]
    assert np.allclose(found.mean, np.mean([s.mean((0, 2, 3)) for s in seen], 0), atol=1e-6)
    unbiased = [s.transpose(1, 0, 2, 3).reshape(2, -1).var(1, ddof=1) for s in seen]
    assert np.allclose(found.var, np.mean(unbiased, 0), atol=1e-6)
    assert found.batches == 3
    assert not network.training
    assert all(torch.equal(kept[n], t) for n, t in network.state_dict().items())


@pytest.mark.parametrize("family", ["cnn", "resnet", "exits", "bases"])
def test_with_statistics_equals_torchs_cumulative_average(family: str) -> None:
    more: dict[str, Any] = {"cnn": {"hidden": 0}, "resnet": {"blocks": 1}, "exits": {"depth": 2}}.get(
        family, {}
    )
    own = {"widths": [4, 6], "norm": "static"} | more
    if family == "bases":
        base = own | {"in_channels": 1, "sample_size": 8, "classes": 3}
        network = FAMILIES["bases"].construct({"family": "cnn", "base": base, "members": [2, 0]})
    else:
        network = made(family, **own)
    batches = [images(n, seed=n) for n in (4, 6, 5)]
    ready = with_statistics(network, batch_statistics(network, batches))
    # The reference: torch's own running statistics with momentum None, over the same network.
    reference = build_with(over_the_wire(ready), ready.state_dict()).train()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for batch in batches:
            reference(batch)
    expected = reference.state_dict()
    assert any("running_var" in name for name in expected)
    for name, tensor in ready.state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name
    assert not ready.training
    assert torch.allclose(ready(images(4))[:2], ready(images(4)[:2]), atol=1e-6)


def test_statistics_are_taken_without_the_scaler() -> None:
    plain = made("cnn", widths=[2, 3], norm="static")
    scaled = made("cnn", widths=[2, 3], norm="static", scale=0.125)
    scaled.load_state_dict(plain.state_dict())
    of_plain, of_scaled = (batch_statistics(m.train(), [images(6)]) for m in (plain, scaled))
    assert all(np.array_equal(of_plain[p].var, of_scaled[p].var) for p in ("norm1", "norm2"))
    assert all(m.training for m in scaled.modules())


def test_statistics_of_other_layers_are_refused() -> None:
    network = made("cnn", widths=[2], norm="static")
    good = batch_statistics(network, [images(3)])
    with pytest.raises(ValueError, match="'norm1' has no statistics"):
        with_statistics(network, {})
    with pytest.raises(ValueError, match="'other' is not part"):
        with_statistics(network, good | {"other": good["norm1"]})
    with pytest.raises(ValueError, match=r"are \[3\], the layer is \[2\]"):
        with_statistics(network, {"norm1": Statistics(np.zeros(3), np.ones(3), 1)})
    with pytest.raises(ValueError, match="has running statistics"):
        batch_statistics(made("cnn", widths=[2], norm="batch"), [images(3)])


def test_a_batch_without_variance_does_not_count() -> None:
    # 8 -> 4 -> 2 -> 1: the fourth layer sees one value a channel of a single image.
    network = made("cnn", widths=[2, 2, 2, 2], norm="static")
    alone = batch_statistics(network, [images(1)])
    assert alone["norm1"].batches == 1
    assert alone["norm4"].batches == 0
    assert alone["norm4"].mean.tolist() == [0, 0]
    assert alone["norm4"].var.tolist() == [1, 1]
    assert batch_statistics(made("cnn", widths=[2]), [images(1)]) == {}


# --- base networks -----------------------------------------------------------------------------


def test_base_networks_are_independent_and_decide_by_their_mean() -> None:
    settings = RunConfig(model="cnn")
    ensemble = initial_bases(settings, (1, 8, 8), 10, 0.25, [3, 5])
    bases = members(ensemble)
    assert list(bases) == [3, 5]
    assert bases[3].state_dict()["conv1.weight"].shape == (4, 1, 3, 3)
    assert not torch.equal(bases[3].state_dict()["conv1.weight"], bases[5].state_dict()["conv1.weight"])
    assert next(iter(ensemble.state_dict())) == "base3.conv1.weight"
    listed = ensemble.train()(images(2))
    assert torch.equal(listed[1], bases[5](images(2)))
    assert torch.allclose(ensemble.eval()(images(2)), (listed[0] + listed[1]) / 2, atol=1e-6)
    # A base network's weights hang on its number, not on its companions.
    alone = initial_bases(settings, (1, 8, 8), 10, 0.25, [5]).state_dict()
    assert all(torch.equal(alone[n], ensemble.state_dict()[n]) for n in alone)
    rebuilt = build_with(over_the_wire(ensemble), ensemble.state_dict()).eval()
    assert torch.equal(rebuilt(images(2)), ensemble(images(2)))


def test_rescaled_weights_are_bounded_as_in_the_whole_network() -> None:
    settings = RunConfig(model="cnn")
    plain = initial_bases(settings, (1, 8, 8), 10, 0.25, [0]).state_dict()
    small = initial_bases(settings, (1, 8, 8), 10, 0.25, [0], rescaled=True).state_dict()
    # The image has all its channels in both; conv2 reads 4 channels instead of 16, the classifier 16 of 64.
    assert torch.equal(small["base0.conv1.weight"], plain["base0.conv1.weight"])
    for name in (
        "base0.conv2.weight",
        "base0.conv2.bias",
        "base0.classifier.weight",
        "base0.classifier.bias",
    ):
        assert torch.allclose(small[name], plain[name] / 2), name
    assert small["base0.conv2.weight"].abs().max() <= 1 / (9 * 16) ** 0.5


def test_only_an_ensemble_has_members() -> None:
    with pytest.raises(TypeError, match="no base networks"):
        members(model("cnn"))
    with pytest.raises(ConfigError, match="not a classifier"):
        initial_bases(RunConfig(model="unet-tiny"), (1, 8, 8), 10, 0.5, [0])


# --- received descriptions ---------------------------------------------------------------------


def spoilt(network: nn.Module, tensor: str, **fields: Any) -> pb.ArchitectureSpec:
    spec = over_the_wire(network)
    (chosen,) = (t for t in spec.tensors if t.name == tensor)
    for field, value in fields.items():
        if field == "shape":
            chosen.shape[:] = value
        else:
            setattr(chosen, field, value)
    return spec


def test_nonsense_is_refused_with_its_place() -> None:
    network = made("cnn", widths=[2, 4], norm="batch")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tensor": "norm1.running_mean", "shape": [3]}, "'norm1.running_mean' has 3 elements"),
        ({"tensor": "norm1.running_var", "buffer": False}, "'norm1.running_var' is a buffer"),
        ({"tensor": "conv1.weight", "buffer": True}, "'conv1.weight' is a parameter"),
        ({"tensor": "conv1.weight", "dtype": "int64"}, "dtype 'int64', expected 'float32'"),
        ({"tensor": "norm1.num_batches_tracked", "dtype": "float32"}, "expected 'int64'"),
        ({"tensor": "hidden.weight", "shape": [64, 15]}, "do not match at 'hidden'"),
        ({"tensor": "classifier.weight", "shape": [3, 63]}, "do not match at 'classifier'"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            build(spoilt(network, **change))
    spec = over_the_wire(network)
    spec.heads["conv1"] = 2
    with pytest.raises(ValueError, match="attention 'conv1' is not part"):
        build(spec)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("cnn", {"widths": []}, "the cnn's argument 'widths'"),
        ("cnn", {"kernel": 5}, "'kernel'"),
        ("cnn", {"norm": "layer"}, "'norm'"),
        ("mlp", {"hidden": "64"}, "'hidden'"),
        ("mlp", {"scale": 2.0}, "'scale'"),
        ("resnet", {"blocks": 1000}, "'blocks'"),
        ("exits", {"depth": 3}, "depth 3 of 2 stages"),
        ("bases", {"members": [1, 1]}, "repeated"),
        ("bases", {"family": "exits"}, "'family'"),
        ("bases", {"base": {"widths": [2]}}, "the cnn's argument"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(family: str, change: dict[str, Any], message: str) -> None:
    common: dict[str, Any] = {"in_channels": 1, "sample_size": 8, "classes": 3}
    good: dict[str, dict[str, Any]] = {
        "mlp": common | {"hidden": [4]},
        "cnn": common | {"widths": [2]},
        "resnet": common | {"widths": [2]},
        "exits": common | {"widths": [2, 2], "depth": 2},
        "bases": {"family": "cnn", "base": common | {"widths": [2]}, "members": [0]},
    }
    FAMILIES[family].construct(good[family])
    with pytest.raises(ValueError, match=message):
        FAMILIES[family].construct(good[family] | change)
