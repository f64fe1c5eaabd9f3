from __future__ import annotations

import pytest
import torch

from espalier.errors import ConfigError
from espalier.models.unet import PRESETS, unet
from tests.support.networks import parameter_count


def test_the_papers_net_has_its_published_size() -> None:
    with torch.device("meta"):
        assert parameter_count(unet("unet-paper", 3, 32)) == 35_746_307


@pytest.mark.parametrize(("preset", "low", "high"), [("unet-tiny", 0.9e6, 1.3e6), ("unet-small", 4e6, 6e6)])
def test_the_small_presets_have_about_their_size(preset: str, low: float, high: float) -> None:
    assert low < parameter_count(unet(preset, 1, 28)) < high


@pytest.mark.parametrize(
    ("preset", "channels", "size"),
    [("unet-tiny", 1, 8), ("unet-tiny", 2, 6), ("unet-small", 1, 28), ("unet-small", 3, 32)],
)
def test_the_output_has_the_shape_of_the_input(preset: str, channels: int, size: int) -> None:
    images = torch.zeros(2, channels, size, size)
    with torch.no_grad():
        assert unet(preset, channels, size)(images, 3).sample.shape == images.shape


def test_a_fifth_can_be_pruned_in_every_preset() -> None:
    for preset in PRESETS.values():
        for width in preset.widths:
            assert width % preset.groups == 0
            assert int(width / preset.groups * 0.8) < width // preset.groups


def test_dropout_is_for_images_of_32_pixels_only() -> None:
    assert PRESETS["unet-paper"].config(3, 32)["dropout"] == 0.1
    assert PRESETS["unet-paper"].config(3, 64)["dropout"] == 0.0


def test_an_unknown_preset_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match="'unet-huge' is unknown; known models are unet-tiny, unet-small, unet-paper"
    ):
        unet("unet-huge", 1, 8)


def test_a_size_that_does_not_fit_is_answered_with_what_would() -> None:
    with pytest.raises(
        ConfigError, match=r"unet-paper .* multiple of 8, not 28; unet-tiny or unet-small takes it"
    ):
        unet("unet-paper", 1, 28)
    with pytest.raises(ConfigError, match="resize the images"):
        unet("unet-tiny", 1, 7)
    with pytest.raises(ConfigError, match="at least one channel"):
        unet("unet-tiny", 0, 8)
