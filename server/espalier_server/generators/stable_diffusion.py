"""Stable Diffusion from a local folder as a generator: a fixed prompt, with the initial noise as latent."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from espalier.distribution import install_command
from espalier.errors import ConfigError
from espalier.generators.base import Options
from espalier.torchvision_shim import import_torchvision
from espalier_server.generators.images import in_batches

_PIPELINE = "StableDiffusionPipeline"
_DETERMINISTIC = ("PNDMScheduler", "DDIMScheduler")
_BATCH = 4


class StableDiffusionGenerator:
    """A diffusers pipeline as a :class:`~espalier.generators.base.Generator`.

    A latent is the initial noise, of unit variance and flattened: H = 4 * 64 * 64 for version 1. The pipeline
    multiplies it by the scheduler's ``init_noise_sigma``.

    Parameters
    ----------
    pipeline : StableDiffusionPipeline
        The pipeline, on the device to compute on.
    prompt : str
        Text prompt of all images.
    steps : int
        Denoising steps.
    guidance : float
        Scale of classifier-free guidance; 1 disables it.
    """

    def __init__(
        self, pipeline: Any, *, prompt: str = "a cat", steps: int = 50, guidance: float = 7.5
    ) -> None:
        self.pipeline, self.steps, self.guidance = pipeline, steps, guidance
        side = pipeline.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        self.shape: tuple[int, int, int] = (pipeline.unet.config.in_channels, height, width)
        with torch.no_grad():
            self.embeddings = pipeline.encode_prompt(
                prompt,
                pipeline.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=guidance > 1,
            )

    @classmethod
    def open(cls, folder: Path, options: Options) -> StableDiffusionGenerator:
        """Open a folder that diffusers' ``save_pretrained`` wrote, without downloads and without a safety checker.

        A scheduler other than PNDM and DDIM is replaced by DDIM with the same noise schedule, because others may add
        noise during sampling, and the image would not be a function of the latent.

        Parameters
        ----------
        folder : Path
            Has ``model_index.json``.
        options : Options
            With ``trust_pickle``, weights may be pickles (``.bin``) where there are no safetensors.

        Raises
        ------
        ConfigError
            The folder holds no Stable Diffusion or only pickles, or transformers is not installed.
        """
        index = folder / "model_index.json"
        try:
            kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"generator: {folder} holds no pipeline ({index.name}: {error}); give a folder that diffusers saved"
            ) from error
        if kind != _PIPELINE:
            raise ConfigError(
                f"generator: {folder} holds a {kind}; Stable Diffusion 1 and 2 ({_PIPELINE}) fit"
            )
        import_torchvision()  # before transformers, which imports torchvision without the shim
        try:
            import transformers  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"generator: Stable Diffusion needs transformers; run: {install_command('sd')}"
            ) from None
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        try:
            pipeline = StableDiffusionPipeline.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=None if options.trust_pickle else True,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
                dtype=torch.float32,
                low_cpu_mem_usage=False,
            )
        except (OSError, ValueError, RuntimeError) as error:
            advice = (
                "" if options.trust_pickle else " (weights that are not safetensors need trust-pickle=true)"
            )
            raise ConfigError(f"generator: {folder} cannot be opened{advice}: {error}") from error
        if type(pipeline.scheduler).__name__ not in _DETERMINISTIC:
            pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        return cls(
            pipeline.to(options.device),
            prompt=options.prompt,
            steps=options.steps,
            guidance=options.guidance,
        )

    @property
    def latent_dim(self) -> int:
        """Channels times height times width of the VAE's latents."""
        return math.prod(self.shape)

    def sample_latents(self, count: int, rng: torch.Generator) -> Tensor:
        """Draw noise; see :class:`~espalier.generators.base.Generator`."""
        return torch.randn(count, self.latent_dim, generator=rng)

    @torch.no_grad()
    def synthesise(self, latents: Tensor, size: int, channels: int) -> Tensor:
        """Draw the prompt from each noise; see :class:`~espalier.generators.base.Generator`."""
        wanted, unwanted = self.embeddings

        def draw(part: Tensor) -> Tensor:
            repeat = (len(part), 1, 1)
            images: Tensor = self.pipeline(
                prompt_embeds=wanted.repeat(repeat),
                negative_prompt_embeds=None if unwanted is None else unwanted.repeat(repeat),
                latents=part.reshape(-1, *self.shape).to(self.pipeline.device),
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                eta=0.0,
                output_type="pt",
            ).images
            return images * 2 - 1

        return in_batches(draw, latents, _BATCH, size, channels)
