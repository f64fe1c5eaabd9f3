"""Espalier's own diffusion models as generators."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from espalier.errors import ConfigError, StateError
from espalier.generators.base import open_generator
from espalier.models.pipeline import save_model
from espalier.models.pruning import prune
from espalier.models.sampling import sample
from espalier.models.unet import unet
from espalier.tasks.diffusion_settings import DiffusionSettings
from tests.support.generator_laws import check, seeded


def test_a_pruned_diffusion_model_draws_from_its_noise(tmp_path: Path) -> None:
    settings = DiffusionSettings(timesteps=100)
    torch.manual_seed(0)
    model = prune(unet("unet-tiny", 1, 8), 0.2)
    save_model(tmp_path / "model", model, schedule=settings)
    generator = open_generator(f"espalier:{tmp_path / 'model'}", device="cpu", steps=3)
    check(generator, 64)
    noise = torch.randn(4, 64, generator=seeded(7))
    expected = sample(model, count=4, steps=3, seed=7, settings=settings)
    torch.testing.assert_close(generator.synthesise(noise, 8, 1), expected, atol=1e-5, rtol=0)
    draws = generator.sample_latents(500, seeded(0))
    assert abs(draws.mean()) < 0.03
    assert abs(draws.std() - 1) < 0.03


def test_too_many_steps_or_no_diffusion_model_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", unet("unet-tiny", 1, 8), schedule=DiffusionSettings(timesteps=20))
    with pytest.raises(ConfigError, match="20 time steps"):
        open_generator(f"espalier:{tmp_path / 'model'}", device="cpu", steps=21)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StateError, match=r"model_index.json is missing"):
        open_generator(f"espalier:{tmp_path / 'empty'}", device="cpu")
