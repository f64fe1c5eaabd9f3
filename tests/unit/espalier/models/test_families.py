from __future__ import annotations

import subprocess
import sys
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional

from espalier.errors import ConfigError
from espalier.methods.run_config import RunConfig
from espalier.models import bodies
from espalier.models.architecture import FAMILIES, build, build_with, describe, is_reduced
from espalier.models.backbone import Backbone
from espalier.models.bodies import patch_size
from espalier.models.families import MODEL_FAMILIES, family_models, model_of
from espalier.models.initial import initial_model
from espalier.models.layers import BatchNorm
from espalier.models.presets import PRESETS, family_of, is_output_tensor, task_of
from espalier.models.variants import narrowed
from espalier_proto import espalier_pb2 as pb
from espalier_server.evaluation.cost import macs_and_params
from tests.support.networks import images, over_the_wire, parameter_count
from tests.support.paths import ROOT

BACKBONES = [name for name, preset in PRESETS.items() if preset.family == "backbone"]
#: Networks that compute within a fraction of a second at 8 pixels.
QUICK = ["cnn4", "resnet4", "resnet6", "resnet10", "googlenet", "mobilenet-v2"]
#: torchvision's documented numbers of parameters (1000 classes; GoogLeNet without its auxiliary outputs).
DOCUMENTED = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "googlenet": 6_624_904,
    "mobilenet-v2": 3_504_872,
    "vit-b-16": 86_567_656,
    "vit-b-32": 88_224_232,
}


def made(name: str, channels: int = 1, size: int = 8, classes: int = 10, **more: Any) -> Backbone:
    torch.manual_seed(7)
    given = {"in_channels": channels, "sample_size": size, "classes": classes}
    return cast(Backbone, FAMILIES["backbone"].construct({**PRESETS[name].arguments, **given, **more}))


def on_meta(name: str, *args: Any, **more: Any) -> Backbone:
    with torch.device("meta"):
        return made(name, *args, **more)


# --- names -------------------------------------------------------------------------------------


def test_families_are_known_without_torch() -> None:
    code = "import sys, espalier.models.families; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_families_have_as_many_models_as_their_names_say() -> None:
    assert {name: len(models) for name, models in MODEL_FAMILIES.items()} == {
        "HtFE-img-2": 2,
        "HtFE-img-3": 3,
        "HtFE-img-4": 4,
        "HtFE-img-8": 8,
        "HtFE-img-9": 9,
        "HtM10": 10,
    }
    everything = {model for models in MODEL_FAMILIES.values() for model in models}
    assert everything == set(BACKBONES)
    assert {task_of(model) for model in everything} == {"classification"}
    assert {family_of(model) for model in everything} == {"backbone"}


@pytest.mark.parametrize("spelling", ["HtFE-img-8", "HtFE8", "HtFE-8", "htfe-img-8", " HtFE8 "])
def test_a_family_goes_by_several_spellings(spelling: str) -> None:
    assert family_models(spelling) == (
        "cnn4",
        "googlenet",
        "mobilenet-v2",
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
    )


def test_other_names() -> None:
    assert family_models("HtM-img-10") == (*family_models("HtFE8"), "vit-b-16", "vit-b-32")
    assert family_models("HtFE2") == ("cnn4", "resnet18")
    assert family_models("cnn-bn") == ("cnn-bn",)
    assert family_models("cnn, mlp,cnn") == ("cnn", "mlp", "cnn")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("HtFE-img-7", "'HtFE-img-7' is unknown .did you mean 'HtFE-img-"),
        ("cnn4,resnet19", "'resnet19' is unknown .did you mean 'resnet1"),
        ("cnn4,,mlp", "names no model in one place"),
        ("", "names no model in one place"),
        ("cnn4,unet-tiny", "unet-tiny is not a classifier"),
        ("cnn4,HtFE2", "'HtFE2' is unknown"),
    ],
)
def test_unknown_families_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        family_models(name)


def test_clients_take_models_in_turn() -> None:
    assert [model_of("HtFE3", place) for place in range(5)] == [
        "resnet10",
        "resnet18",
        "resnet34",
        "resnet10",
        "resnet18",
    ]
    assert model_of(["cnn", "mlp"], 7) == "mlp"
    with pytest.raises(ValueError, match="place -1"):
        model_of("HtFE3", -1)
    with pytest.raises(ValueError, match="no models"):
        model_of([], 0)


# --- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTED)
def test_networks_have_their_documented_sizes(name: str) -> None:
    assert parameter_count(on_meta(name, 3, 224, 1000, feature_dim=0, head=0)) == DOCUMENTED[name]


def test_the_short_resnets_by_hand() -> None:
    before, total = 64, 9 * 3 * 64 + 2 * 64
    for name, width in (("resnet4", 64), ("resnet6", 128), ("resnet8", 256), ("resnet10", 512)):
        # Two convolutions and their normalisations; a 1x1 convolution and its own around a stage that halves.
        total += 9 * before * width + 9 * width * width + 4 * width
        total += before * width + 2 * width if before != width else 0
        before = width
        # The output layer reads 512 values whatever the network's width.
        assert parameter_count(on_meta(name, 3, 32, 10)) == total + 512 * 10 + 10


@pytest.mark.parametrize(("size", "side"), [(32, 5), (64, 13), (28, 4), (16, 1), (15, 2), (8, 1)])
def test_the_cnn_is_htfllibs(size: int, side: int) -> None:
    # HtFLlib's flattened widths are 1600 at 32 pixels, 10816 at 64 and 1024 at 28.
    network = on_meta("cnn4", 3, size, 100)
    assert network.state_dict()["body.hidden.weight"].shape == (512, 64 * side**2)
    convolutions = (25 * 3 + 1) * 32 + (25 * 32 + 1) * 64
    assert parameter_count(network) == convolutions + (64 * side**2 + 1) * 512 + 513 * 100
    if size == 32:
        # What FedKTL's table 5 charges FML for it, 100 classes.
        assert parameter_count(network) == 924_708


def test_patches_fill_the_image() -> None:
    sizes = (8, 9, 26, 28, 31, 32, 48, 64, 96, 222, 224)
    assert [patch_size(16, s) for s in sizes] == [8, 9, 13, 14, 31, 16, 16, 16, 16, 37, 16]
    assert [patch_size(32, s) for s in sizes] == [8, 9, 26, 28, 31, 32, 24, 32, 32, 37, 32]
    assert patch_size(2, 31) == 1
    for nominal in (16, 32):
        for size in range(8, 225):
            patch = patch_size(nominal, size)
            assert size % patch == 0
            # Never many more tokens than the 196 of a whole image.
            assert (size // patch) ** 2 <= 256


def test_operations_of_a_vision_transformer() -> None:
    network = on_meta("vit-b-32", 1, 64, 10)
    tokens, width = 2 * 2 + 1, 768
    linear = 12 * tokens * (4 * width**2 + 2 * width * 3072)
    norms = 25 * 2 * tokens * width
    macs = 4 * 32 * 32 * width + linear + norms + 512 * 768 + 768 * 10
    assert macs_and_params(network) == (macs, parameter_count(network))


# --- shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_every_network_is_described_and_rebuilt(name: str) -> None:
    for channels, size in ((1, 9), (2, 28)) if name in ("cnn4", "resnet4", "vit-b-16") else ((2, 9),):
        network = on_meta(name, channels, size, 7)
        rebuilt = cast(Backbone, build(over_the_wire(network)))  # runs it on meta, too: [1, 7] comes out
        assert describe(rebuilt) == describe(network)
    given = torch.empty(2, network.in_channels, network.sample_size, network.sample_size, device="meta")
    assert rebuilt.eval().features(given).shape == (2, 512)
    assert {t.name: t.shape[0] for t in describe(network).tensors if is_output_tensor(t.name)} == {
        "classifier.weight": 7,
        "classifier.bias": 7,
    }


@pytest.mark.parametrize(
    ("name", "small", "large"),
    [("resnet4", 63, 16), ("googlenet", 16, 2), ("mobilenet-v2", 4, 2)],
)
def test_small_images_get_a_stem_without_pooling(name: str, small: int, large: int) -> None:
    """Sides of the last maps just below and at the bound; a 3x3 kernel below it."""
    for size, expected in ((63, small), (64, large)):
        network = on_meta(name, 3, size, 10).eval()
        seen: list[int] = []
        last = {"resnet4": "layer1", "googlenet": "inception5b", "mobilenet-v2": "features"}[name]
        network.body.get_submodule(last).register_forward_hook(lambda _, __, out: seen.append(out.shape[-1]))  # noqa: B023
        network(torch.empty(1, 3, size, size, device="meta"))
        assert seen == [expected]
        stem = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
        assert stem.kernel_size == ((3, 3) if size < 64 or name == "mobilenet-v2" else (7, 7))


def test_features_are_pooled_to_one_width_by_hand() -> None:
    wide, narrow, own = (
        made("googlenet").eval(),
        made("resnet4").eval(),
        made("resnet4", feature_dim=0).eval(),
    )
    with torch.no_grad():
        values = wide.body(images(3))
        assert values.shape == (3, 1024)
        assert torch.allclose(wide.features(images(3)), (values[:, ::2] + values[:, 1::2]) / 2)
        values = narrow.body(images(3))
        assert torch.equal(narrow.features(images(3)), values.repeat_interleave(8, 1))
        assert own.features(images(3)).shape == (3, 64)
        assert own.classifier.in_features == 64


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUICK)
def test_a_rebuilt_network_computes_the_same(name: str) -> None:
    network = made(name, 2, 8, 5, projection=6)
    assert not is_reduced(network)
    with torch.no_grad():
        network(images(8, 2))  # moves running statistics away from where they start
    rebuilt = cast(Backbone, build_with(over_the_wire(network), network.state_dict())).eval()
    network.eval()
    with torch.no_grad():
        features = network.features(images(3, 2))
        assert torch.equal(rebuilt.features(images(3, 2)), features)
        assert features.std() > 0
        z = network.project(images(3, 2))
        assert z.shape == (3, 6)
        assert torch.allclose(network(images(3, 2)), network.classifier(z))
        assert torch.equal(rebuilt(images(3, 2)), network.logits(features))


@pytest.mark.parametrize("name", QUICK)
def test_a_batch_of_one_trains_every_parameter(name: str) -> None:
    network = made(name, 1, 16 if name == "cnn4" else 8, 3).train()
    assert not any(type(m) is nn.BatchNorm2d for m in network.modules())
    loss = functional.cross_entropy(network(images(1, size=network.sample_size)), torch.tensor([1]))
    loss += functional.cross_entropy(network(images(6, size=network.sample_size)), torch.arange(6) % 3)
    loss.backward()  # type: ignore[no-untyped-call]
    for path, parameter in network.named_parameters():
        assert parameter.grad is not None, path
        assert torch.isfinite(parameter.grad).all(), path


def test_normalisation_keeps_the_networks_constants() -> None:
    norms = [m for m in made("googlenet").modules() if isinstance(m, BatchNorm)]
    assert {(m.eps, m.momentum) for m in norms} == {(0.001, 0.1)}
    assert len(norms) == 3 + 9 * 6


def test_a_resnet_is_torchvisions() -> None:
    """The whole network at 64 pixels with torchvision's own as the reference, and its weights."""
    from torchvision.models import resnet18

    theirs = resnet18(num_classes=4).eval()
    ours = made("resnet18", 3, 64, 4, feature_dim=0).eval()
    ours.load_state_dict(
        {
            f"body.{n}" if not n.startswith("fc.") else f"classifier{n[2:]}": t
            for n, t in theirs.state_dict().items()
        }
    )
    with torch.no_grad():
        assert torch.allclose(ours(images(2, 3, 64)), theirs(images(2, 3, 64)), atol=1e-5)


def test_a_vision_transformer_of_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_VIT_LAYERS", 1)
    network = made("vit-b-16", 1, 28, 4)
    t = network.state_dict()
    assert t["body.conv_proj.weight"].shape == (768, 1, 14, 14)
    assert t["body.encoder.pos_embedding"].shape == (1, 2 * 2 + 1, 768)
    assert list(t)[-4:] == ["head.weight", "head.bias", "classifier.weight", "classifier.bias"]
    rebuilt = build_with(over_the_wire(network), t)
    assert torch.equal(rebuilt.eval()(images(2, 1, 28)), network.eval()(images(2, 1, 28)))
    with torch.no_grad():
        features = network.features(images(2, 1, 28))
        assert torch.equal(network.project(images(2, 1, 28)), features)
        hidden = torch.tanh(features @ t["head.weight"].T + t["head.bias"])
        expected = hidden @ t["classifier.weight"].T + t["classifier.bias"]
        assert torch.allclose(network(images(2, 1, 28)), expected, atol=1e-5)
    functional.cross_entropy(network.train()(images(1, 1, 28)), torch.tensor([2])).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_initial_weights_depend_on_the_seed_only() -> None:
    first, again = (initial_model(RunConfig(model="resnet6"), (3, 8, 8), 10) for _ in range(2))
    other = initial_model(RunConfig(model="resnet6", seed=3), (3, 8, 8), 10)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.state_dict()["body.conv1.weight"], other.state_dict()["body.conv1.weight"])


# --- refusals ----------------------------------------------------------------------------------


def test_they_come_in_one_width() -> None:
    with pytest.raises(ConfigError, match="resnet18 has a fixed width"):
        narrowed(describe(on_meta("resnet18")), 0.5)


def test_descriptions_that_make_no_sense_are_refused() -> None:
    spec = describe(on_meta("vit-b-16", 1, 28, 4))
    with pytest.raises(ValueError, match="argument 'network'"):
        FAMILIES["backbone"].construct(
            {"network": "resnet19", "in_channels": 1, "sample_size": 8, "classes": 2}
        )
    wrong = pb.ArchitectureSpec.FromString(spec.SerializeToString())
    wrong.config["sample_size"] = 42
    with pytest.raises(ValueError, match="do not match"):
        build(wrong)
    wrong.config["sample_size"] = 28
    next(t for t in wrong.tensors if t.name.endswith("in_proj_weight")).shape[0] = 768
    with pytest.raises(ValueError, match="do not match"):
        build(wrong)
    wrong.config["scale"] = 0.5
    with pytest.raises(ValueError, match="argument 'scale'"):
        build(wrong)
