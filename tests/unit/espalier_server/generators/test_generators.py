"""Generators: a tiny but real instance of each kind, and the training of the small GAN."""

from __future__ import annotations

import importlib
import json
import math
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from espalier.errors import ConfigError, StateError
from espalier.generators.base import open_generator, parse_generator
from espalier.models.diffusion import sample
from espalier.models.pipeline import save_model
from espalier.models.pruning import prune
from espalier.models.unet import unet
from espalier.tasks.diffusion_settings import DiffusionSettings
from espalier.torchvision_shim import import_torchvision
from espalier_server.generators.images import fit
from espalier_server.generators.stylegan import StyleGanGenerator
from tests.support.generator_laws import check, seeded

CPU = torch.device("cpu")


# --- the form of images -----------------------------------------------------------------------------


def test_rgb_becomes_grey_as_pillow_makes_it() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).convert("L"), np.float64)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    grey = (fit(images, 6, 1)[0, 0].double() + 1) * 127.5
    np.testing.assert_allclose(grey, expected, atol=1.0)  # Pillow rounds
    rgb = fit(images[:, :1], 6, 3)
    assert torch.equal(rgb[:, 0], rgb[:, 2])


def test_a_wide_image_is_cut_at_its_centre() -> None:
    wide = torch.arange(8.0).repeat(4, 1)[None, None] / 8 - 0.5
    assert torch.equal(fit(wide, 4, 1), wide[..., 2:6])
    # Halved first, to 2 x 4: the mean of each column with its neighbour, here of the middle two.
    halved = fit(torch.tensor([0.0, 0, 0.4, 0.4, 0.8, 0.8, 0, 0]).repeat(4, 1)[None, None], 2, 1)[0, 0, 0]
    assert 0.3 < halved[0] < halved[1] < 0.8
    assert fit(torch.full((1, 1, 4, 4), 3.0), 2, 1).max() == 1


# --- SPEC --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["gan", "gan:", "biggan:x", "", "runs/model", "StyleGAN3:x.pkl"])
def test_a_spec_that_names_no_generator_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="stylegan-xl:FILE"):
        parse_generator(spec)


def test_a_spec_is_read() -> None:
    assert parse_generator("sd:/a:b").path == Path("/a:b")
    assert parse_generator("gan:~/g").path == Path.home() / "g"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": 0}, "at least 1"), ({"guidance": 0.5}, "guidance"), ({"guidance": math.nan}, "guidance")],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        open_generator(f"sd:{tmp_path}", **options)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        open_generator(f"gan:{tmp_path / 'nowhere'}")


# --- StyleGAN ----------------------------------------------------------------------------------------

STYLEGAN = """
import torch
from torch import nn

opened = []

class Mapping(nn.Module):
    def __init__(self, z_dim, c_dim, w_dim, num_ws):
        super().__init__()
        self.linear, self.num_ws, self.c_dim = nn.Linear(z_dim + c_dim, w_dim), num_ws, c_dim

    def forward(self, z, c, truncation_psi=0.5):
        assert truncation_psi == 1
        assert (c is None) == (self.c_dim == 0)
        x = z if c is None else torch.cat((z, c), 1)
        return self.linear(x)[:, None].repeat(1, self.num_ws, 1)

class Synthesis(nn.Module):
    def __init__(self, w_dim, num_ws):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(w_dim, 3 * 16 * 16) for _ in range(num_ws))

    def forward(self, ws, noise_mode="random"):
        noise = 0 if noise_mode == "const" else torch.randn(len(ws), 3 * 16 * 16)
        x = sum(layer(ws[:, i]) for i, layer in enumerate(self.layers)) + noise
        return x.reshape(-1, 3, 16, 16)

class Network(nn.Module):
    def __init__(self, c_dim=0):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws = 6, c_dim, 9, 3
        self.mapping, self.synthesis = Mapping(6, c_dim, 9, 3), Synthesis(9, 3)

    def __setstate__(self, state):
        opened.append(1)
        super().__setstate__(state)
"""


@pytest.fixture
def stylegan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "tiny_stylegan.py").write_text(STYLEGAN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny_stylegan", raising=False)
    torch.manual_seed(0)
    return importlib.import_module("tiny_stylegan")


def pickled(content: object, file: Path) -> Path:
    file.write_bytes(pickle.dumps(content))
    return file


@pytest.mark.parametrize(("kind", "c_dim"), [("stylegan3", 0), ("stylegan-xl", 4)])
def test_a_stylegan_is_opened_only_when_trusted(
    kind: str, c_dim: int, stylegan: ModuleType, tmp_path: Path
) -> None:
    network = stylegan.Network(c_dim)
    file = pickled({"G": None, "D": None, "G_ema": network}, tmp_path / "net.pkl")
    stylegan.opened.clear()
    with pytest.raises(ConfigError, match="trust-pickle=true"):
        open_generator(f"{kind}:{file}", device="cpu")
    assert not stylegan.opened  # nothing of it ran
    generator = open_generator(f"{kind}:{file}", trust_pickle=True, device="cpu")
    assert stylegan.opened
    check(generator, 9)
    latents = generator.sample_latents(2, seeded(3))
    with torch.no_grad():
        expected = network.synthesis(latents[:, None].repeat(1, 3, 1), noise_mode="const")
    assert torch.allclose(generator.synthesise(latents, 16, 3), expected.clamp(-1, 1), atol=1e-6)


def test_latents_of_stylegan_xl_are_of_random_classes(stylegan: ModuleType) -> None:
    network = stylegan.Network(4)
    with torch.no_grad():
        network.mapping.linear.weight[:, :6] = 0
        network.mapping.linear.weight[:4, 6:] = torch.eye(4)
        network.mapping.linear.bias.zero_()
    latents = StyleGanGenerator(network, CPU, classes=True).sample_latents(400, seeded(0))
    counts = latents[:, :4].sum(0)
    assert torch.equal(latents[:, :4].sum(1), torch.ones(400))
    assert counts.min() > 60  # 100 expected, deviation 9


def test_a_pickle_of_something_else_is_refused(stylegan: ModuleType, tmp_path: Path) -> None:
    def refused(content: object, message: str, kind: str = "stylegan3") -> None:
        with pytest.raises(ConfigError, match=message):
            open_generator(f"{kind}:{pickled(content, tmp_path / 'x.pkl')}", trust_pickle=True, device="cpu")

    refused({"D": stylegan.Network()}, "neither a network")
    refused([1, 2], "neither a network")
    refused(nn.Linear(2, 2), "no mapping, synthesis, num_ws")
    refused(stylegan.Network(), "write stylegan3:", "stylegan-xl")
    refused(stylegan.Network(4), "write stylegan-xl:")
    broken = tmp_path / "broken.pkl"
    broken.write_bytes(b"\x80\x04no pickle")
    with pytest.raises(ConfigError, match=r"broken.pkl cannot be unpickled"):
        open_generator(f"stylegan3:{broken}", trust_pickle=True, device="cpu")


def test_the_code_that_a_pickle_lacks_is_named(
    stylegan: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = pickled(stylegan.Network(), tmp_path / "net.pkl")
    (tmp_path / "tiny_stylegan.py").unlink()
    monkeypatch.delitem(sys.modules, "tiny_stylegan")
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match="needs the module 'tiny_stylegan'"):
        open_generator(f"stylegan3:{file}", trust_pickle=True, device="cpu")


# --- a diffusion model of ours -----------------------------------------------------------------------


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


# --- Stable Diffusion --------------------------------------------------------------------------------


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
