"""Stable Diffusion as a generator, with few weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from espalier.errors import ConfigError
from espalier.generators.base import open_generator
from espalier.torchvision_shim import import_torchvision
from tests.support.generator_laws import check, seeded


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Put a random Stable Diffusion together from the real parts, each with few weights."""
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    letters = [chr(ord("a") + i) for i in range(26)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    merges = [("c", "a"), ("ca", "t</w>")]
    vocabulary = {word: i for i, word in enumerate([*words, "ca", "cat</w>"])}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=12)
    torch.manual_seed(0)
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    denoiser = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
    )
    decoder = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    pipeline = StableDiffusionPipeline(
        vae=decoder,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=denoiser,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("sd") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


def test_stable_diffusion_draws_a_function_of_its_first_noise(stable_diffusion: Path) -> None:
    generator = open_generator(f"sd:{stable_diffusion}", device="cpu", steps=4)
    check(generator, 4 * 8 * 8)
    latents = generator.sample_latents(3, seeded(0))
    assert abs(latents.std() - 1) < 0.1
    images = generator.synthesise(latents, 16, 3)
    # What a user of diffusers gets with the same noise and the prompt in words.
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(str(stable_diffusion), low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        ["a cat"] * 3,
        latents=latents.reshape(3, 4, 8, 8),
        num_inference_steps=4,
        guidance_scale=7.5,
        output_type="np",
    ).images
    expected = torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


def test_prompt_and_guidance_matter(stable_diffusion: Path) -> None:
    drawn = []
    for options in ({}, {"prompt": "dog"}, {"guidance": 1.0}):
        generator = open_generator(f"sd:{stable_diffusion}", device="cpu", steps=2, **options)
        drawn.append(generator.synthesise(generator.sample_latents(1, seeded(0)), 16, 3))
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_scheduler_that_draws_noise_gives_way(stable_diffusion: Path, tmp_path: Path) -> None:
    import shutil

    from diffusers import EulerAncestralDiscreteScheduler

    folder = tmp_path / "tiny"
    shutil.copytree(stable_diffusion, folder)
    EulerAncestralDiscreteScheduler().save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerAncestralDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    check(open_generator(f"sd:{folder}", device="cpu", steps=2), 256)


def test_what_is_no_stable_diffusion_or_only_pickles_is_refused(
    stable_diffusion: Path, tmp_path: Path
) -> None:
    import shutil

    with pytest.raises(ConfigError, match="holds no pipeline"):
        open_generator(f"sd:{tmp_path}", device="cpu")
    folder = tmp_path / "tiny"
    shutil.copytree(stable_diffusion, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file

    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ConfigError, match="need trust-pickle=true"):
        open_generator(f"sd:{folder}", device="cpu")
    assert open_generator(f"sd:{folder}", device="cpu", trust_pickle=True).latent_dim == 256
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(ConfigError, match="holds a StableDiffusionXLPipeline"):
        open_generator(f"sd:{folder}", device="cpu")
