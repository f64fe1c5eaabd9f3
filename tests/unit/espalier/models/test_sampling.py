"""The noise schedule and sampling with DDIM."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from espalier.models.noise_schedule import ddim_schedule, noise_schedule
from espalier.models.sampling import sample
from espalier.models.unet import unet
from espalier.tasks.diffusion_settings import DiffusionSettings

SETTINGS = DiffusionSettings()
ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def test_training_and_sampling_share_the_linear_schedule() -> None:
    for schedule in (noise_schedule(SETTINGS), ddim_schedule(SETTINGS)):
        assert np.allclose(schedule.alphas_cumprod.numpy(), ABAR, rtol=1e-4)


@pytest.mark.parametrize("steps", [10, 50, 100])
def test_sampling_visits_the_papers_steps(steps: int) -> None:
    schedule = ddim_schedule(SETTINGS)
    schedule.set_timesteps(steps)
    assert schedule.timesteps.tolist() == np.linspace(-1, 999, steps + 1)[1:].astype(int)[::-1].tolist()


class OneImage(nn.Module):
    """The exact noise predictor of a data set that holds a single image."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = nn.Parameter(image)
        self.config = SimpleNamespace(sample_size=image.shape[-1], in_channels=image.shape[0])

    def forward(self, noisy: Tensor, time: int, return_dict: bool) -> tuple[Tensor]:
        abar = float(ABAR[time])
        return ((noisy - abar**0.5 * self.image) / (1 - abar) ** 0.5,)


def test_an_exact_predictor_leads_to_its_image() -> None:
    image = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    drawn = sample(OneImage(image), count=3, steps=20, seed=4, settings=SETTINGS)
    assert drawn.shape == (3, 2, 4, 4)
    assert torch.allclose(drawn, image.expand(3, -1, -1, -1), atol=1e-4)


def test_images_outside_the_range_are_clipped() -> None:
    drawn = sample(OneImage(torch.full((1, 4, 4), 3.0)), count=1, steps=20, seed=4, settings=SETTINGS)
    assert drawn.max() <= 1


def test_images_depend_on_the_seed_and_not_on_the_batch() -> None:
    torch.manual_seed(0)
    model = unet("unet-tiny", 1, 8)
    draw = [
        sample(model, count=5, steps=4, seed=s, settings=SETTINGS, batch=b)
        for s, b in ((1, 5), (1, 2), (2, 5))
    ]
    assert torch.allclose(draw[0], draw[1], atol=1e-3)
    assert not torch.allclose(draw[0], draw[2], atol=1e-2)
    assert model.training
    assert sample(model, count=0, steps=4, seed=1, settings=SETTINGS).shape == (0, 1, 8, 8)


def test_diffusers_pipeline_draws_the_same() -> None:
    from diffusers import DDIMPipeline

    torch.manual_seed(0)
    model = unet("unet-tiny", 1, 8).eval()
    pipeline = DDIMPipeline(unet=model, scheduler=ddim_schedule(SETTINGS))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        3, generator=torch.Generator().manual_seed(9), num_inference_steps=5, output_type="pt"
    ).images
    ours = sample(model, count=3, steps=5, seed=9, settings=SETTINGS)
    assert torch.allclose(theirs, ours / 2 + 0.5, atol=1e-5)


def test_sample_needs_a_schedule() -> None:
    with pytest.raises(TypeError, match="settings or a scheduler"):
        sample(OneImage(torch.zeros(1, 4, 4)), count=1, steps=2, seed=0)
