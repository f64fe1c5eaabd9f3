"""The small GAN of ours: its networks against formulas, its training, its folder and its command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from espalier.cli import command_line
from espalier.data.imageset import TensorImages
from espalier.errors import ConfigError, StateError
from espalier.generators.base import open_generator
from espalier_server.generators.gan import GanGenerator, load_gan, save_gan
from espalier_server.generators.networks import (
    Discriminator,
    GanConfig,
    StyledConv,
    StyleGenerator,
    native_size,
)
from espalier_server.generators.pretrain import Progress, Recipe, pretrain, sample_grid
from tests.support.generator_laws import check, seeded

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("size", "native", "sides"),
    [
        (8, 8, (4, 8)), (28, 28, (7, 14, 28)), (32, 32, (4, 8, 16, 32)), (64, 64, (4, 8, 16, 32, 64)),
        (5, 8, (4, 8)), (30, 32, (4, 8, 16, 32)), (100, 64, (4, 8, 16, 32, 64)), (20, 20, (5, 10, 20)),
    ],
)  # fmt: skip
def test_sizes_are_a_small_base_doubled(size: int, native: int, sides: tuple[int, ...]) -> None:
    assert native_size(size) == native
    assert GanConfig(native, 1, 10).sides == sides


@pytest.mark.parametrize("double", [False, True])
def test_modulation_equals_one_set_of_weights_per_image(double: bool) -> None:
    layer = StyledConv(5, 7, 6, seeded(0), double=double)
    x, w = torch.randn(3, 5, 8, 8, generator=seeded(1)), torch.randn(3, 6, generator=seeded(2))
    expected = []
    for image, latent in zip(x, w, strict=True):
        style = layer.style(latent[None])[0]
        if double:
            weight = layer.weight * layer.scale * style[:, None, None, None]
            weight = weight / (weight.square().sum((0, 2, 3), keepdim=True) / 4).sqrt()
            expected.append(functional.conv_transpose2d(image[None], weight, stride=2, padding=1))
        else:
            weight = layer.weight * layer.scale * style[:, None, None]
            weight = weight / weight.square().sum((1, 2, 3), keepdim=True).sqrt()
            expected.append(functional.conv2d(image[None], weight, padding=1))
    torch.testing.assert_close(layer(x, w), torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_a_new_generator_keeps_its_scale() -> None:
    config = GanConfig(28, 1, 10)
    network, judge = StyleGenerator(config, seeded(0)), Discriminator(config, seeded(1))
    z, classes = torch.randn(64, 128, generator=seeded(2)), torch.randint(10, (64,), generator=seeded(3))
    w = network.mapping(z, classes)
    assert 0.5 < w.square().mean() < 2
    images = network(z, classes)
    assert images.shape == (64, 1, 28, 28)
    assert judge(images, classes).abs().mean() < 10


def tiny_data() -> TensorImages:
    """Two classes: the left half white, and the right."""
    pixels = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    pixels[:20, :, :, :4], pixels[20:, :, :, 4:] = 255, 255
    return TensorImages(pixels, np.repeat(np.arange(2), 20), ("left", "right"), "halves")


def test_a_short_training_learns_which_half_is_white() -> None:
    said: list[Progress] = []
    recipe = Recipe(batch=16)
    network, notes = pretrain(tiny_data(), steps=60, latent_dim=16, recipe=recipe, say=said.append, every=0.0)
    z = torch.randn(32, 16, generator=seeded(5))
    classes = torch.arange(2).repeat(16)
    with torch.no_grad():
        images = network(z, classes)
    left = images[..., :4].mean((1, 2, 3)) - images[..., 4:].mean((1, 2, 3))
    assert left[::2].mean() > 0.3
    assert left[1::2].mean() < -0.3
    assert said[-1].step == 60
    assert said[-1].share == 1
    assert notes["steps"] == 60
    assert notes["data"] == "halves"


def test_a_batch_comes_in_groups_of_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    data, fetched = tiny_data(), []
    fetch = data.fetch

    def recorded(indices: NDArray[np.int64]) -> torch.Tensor:
        fetched.append(data.labels[indices])
        return fetch(indices)

    monkeypatch.setattr(data, "fetch", recorded)
    pretrain(data, steps=4, latent_dim=8, recipe=Recipe(batch=32))
    for labels in fetched:
        # The discriminator's groups: 32 / 4 = 8 places apart.
        assert len(labels) == 32
        assert all(len(set(labels[i::8])) == 1 for i in range(8))
    assert 0.2 < np.mean(fetched) < 0.8  # both classes, as the data have them


def test_the_same_seed_and_steps_give_the_same_generator() -> None:
    recipe = Recipe(batch=8, shift=1)
    runs = [
        pretrain(tiny_data(), steps=3, seed=seed, latent_dim=8, recipe=recipe)[0].state_dict()
        for seed in (1, 1, 2)
    ]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["synthesis.constant"], runs[2]["synthesis.constant"])


def test_a_generator_comes_back_from_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "g"
    network = StyleGenerator(GanConfig(12, 3, 4, latent_dim=16), seeded(0))
    grid = sample_grid(network, seed=0, rows=2)
    save_gan(folder, network, {"steps": 5}, grid)
    save_gan(folder, network, {"steps": 6}, grid)  # replaces the former
    assert sorted(p.name for p in folder.iterdir()) == [
        "generator.json",
        "generator.safetensors",
        "samples.png",
    ]
    assert [p.name for p in folder.parent.iterdir()] == ["g"]
    generator = open_generator(f"gan:{folder}", device="cpu")
    assert isinstance(generator, GanGenerator)
    assert generator.notes == {"steps": 6}
    check(generator, 16)
    w = generator.sample_latents(2, seeded(0))
    assert torch.equal(generator.synthesise(w, 12, 3), network.synthesis(w).detach())


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    network = StyleGenerator(GanConfig(8, 1, 2, latent_dim=4), seeded(0))
    with pytest.raises(ConfigError, match="is no generator's folder"):
        save_gan(tmp_path, network, {}, sample_grid(network, seed=0, rows=1))
    assert (tmp_path / "thesis.txt").exists()
    with pytest.raises(ConfigError, match="espalier pretrain-generator"):
        load_gan(tmp_path, CPU)


def test_a_damaged_generator_is_named(tmp_path: Path) -> None:
    network = StyleGenerator(GanConfig(8, 1, 2, latent_dim=4), seeded(0))
    folder = tmp_path / "g"
    save_gan(folder, network, {}, sample_grid(network, seed=0, rows=1))
    index, weights = folder / "generator.json", folder / "generator.safetensors"
    text, content = json.loads(index.read_text()), weights.read_bytes()
    for changed in ({"config": text["config"] | {"size": 9}}, {"config": {"colour": 1}}, {"config": None}):
        index.write_text(json.dumps(text | changed))
        with pytest.raises(StateError, match=r"generator.json is damaged"):
            load_gan(folder, CPU)
    index.write_text(json.dumps(text | {"format": 9}))
    with pytest.raises(ConfigError, match="format 1"):
        load_gan(folder, CPU)
    index.write_text("{")
    with pytest.raises(StateError, match=r"generator.json is damaged"):
        load_gan(folder, CPU)
    index.write_text(json.dumps(text | {"config": text["config"] | {"latent_dim": 5}}))
    with pytest.raises(StateError, match=r"generator.safetensors is damaged"):
        load_gan(folder, CPU)
    index.write_text(json.dumps(text))
    weights.write_bytes(content[:100])
    with pytest.raises(StateError, match=r"generator.safetensors is damaged"):
        load_gan(folder, CPU)
    weights.unlink()
    with pytest.raises(StateError, match=r"generator.safetensors is missing"):
        load_gan(folder, CPU)


@pytest.mark.parametrize(
    "options", [{"minutes": 0.0}, {"minutes": math.nan}, {"steps": 0}, {"minutes": None}]
)
def test_a_training_without_an_end_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="minutes or steps"):
        pretrain(tiny_data(), **options)


def test_minutes_end_a_training() -> None:
    _, notes = pretrain(tiny_data(), minutes=0.01, latent_dim=8)
    assert notes["steps"] >= 1
    assert 0.6 <= notes["seconds"] < 30


def test_the_command_trains_and_writes(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    out = tmp_path / "digits"
    command = ["pretrain-generator", "--data", "digits", "--out", str(out), "--steps", "2", "--latent", "8"]
    done = CliRunner().invoke(command_line(), [*command, "--device", "cpu"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "1437 images of digits, 1 x 8 x 8, 10 classes" in done.stdout
    assert "100%" in done.stdout
    with Image.open(out / "samples.png") as grid:
        assert grid.width > grid.height > 100
    assert open_generator(f"gan:{out}", device="cpu").latent_dim == 8
