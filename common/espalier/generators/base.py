"""What a generator is to FedKTL, and how the one that a setting names is opened; no torch until one is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from espalier.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KINDS: dict[str, str] = {
    "gan": "FOLDER",
    "espalier": "MODEL_FOLDER",
    "stylegan-xl": "FILE.pkl",
    "stylegan3": "FILE.pkl",
    "sd": "FOLDER",
}
"""Kinds of generators, and what stands behind the colon."""

GRAMMAR = ", ".join(f"{kind}:{rest}" for kind, rest in KINDS.items())

PICKLED = ("stylegan-xl", "stylegan3")
"""Kinds whose files execute code when they are opened."""


class Generator(Protocol):
    """A trained, frozen generator of images (FedKTL, Zhang et al. 2024).

    FedKTL's feature transformer maps class prototypes to where the generator's own latents lie, and the
    images synthesised there teach the clients.

    Attributes
    ----------
    latent_dim : int
        H, the length of one latent, flattened.
    """

    @property
    def latent_dim(self) -> int: ...  # noqa: D102

    def sample_latents(self, count: int, rng: torch.Generator) -> Tensor:
        """Draw latents of the distribution W that F(P) must match.

        Parameters
        ----------
        count : int
            Number of latents.
        rng : torch.Generator
            The only source of randomness; on the CPU, so that every device draws the same.

        Returns
        -------
        Tensor
            float32 [count, H], on the CPU.
        """

    def synthesise(self, latents: Tensor, size: int, channels: int) -> Tensor:
        """Turn latents into images; the same latents always give the same images.

        Parameters
        ----------
        latents : Tensor
            float32 [count, H], anywhere.
        size : int
            Height and width of the wanted images in pixels.
        channels : int
            1 (grey) or 3 (RGB).

        Returns
        -------
        Tensor
            float32 [count, channels, size, size] in [-1, 1], on the CPU: resized, cut at the centre, and
            turned to grey or RGB where the generator's own images are otherwise.
        """


@dataclass(frozen=True)
class GeneratorSpec:
    """A parsed SPEC: one of `KINDS` and the path of its file or folder."""

    kind: str
    path: Path


def parse_generator(spec: str) -> GeneratorSpec:
    """Read a generator SPEC, without opening anything.

    Parameters
    ----------
    spec : str
        ``KIND:PATH``; see `KINDS`.

    Raises
    ------
    ConfigError
        The kind is unknown or the path is missing.
    """
    kind, colon, path = spec.strip().partition(":")
    if not colon or kind not in KINDS or not path.strip():
        raise ConfigError(f"generator: {spec!r} is not understood; give one of {GRAMMAR}")
    return GeneratorSpec(kind, Path(path.strip()).expanduser())


def open_generator(
    spec: str,
    *,
    trust_pickle: bool = False,
    device: torch.device | str = "auto",
    prompt: str = "a cat",
    steps: int = 50,
    guidance: float = 7.5,
) -> Generator:
    """Open the generator that a SPEC names.

    Parameters
    ----------
    spec : str
        ``gan:FOLDER`` (of ``espalier pretrain-generator``), ``espalier:MODEL_FOLDER`` (of a run of a diffusion
        method), ``stylegan-xl:FILE.pkl``, ``stylegan3:FILE.pkl`` or ``sd:FOLDER`` (Stable Diffusion 1 or 2 as
        diffusers saves it).
    trust_pickle : bool
        Whether files may be opened that execute code when opened: StyleGAN's pickles, and weights of Stable
        Diffusion that are not safetensors.
    device : torch.device or str
        Where images are synthesised; "auto" is a GPU when there is one.
    prompt : str
        What Stable Diffusion draws, the same for every class.
    steps : int
        Denoising steps of ``sd`` and ``espalier``.
    guidance : float
        Classifier-free guidance of ``sd``; 1 is none.

    Raises
    ------
    ConfigError
        The SPEC does not parse, an option is out of range, what it names is not there or of another kind, or
        opening it would execute code and is not trusted to.
    StateError
        A folder that Espalier wrote is damaged.
    """
    named = parse_generator(spec)
    if steps < 1:
        raise ConfigError(f"generator: {steps} denoising steps are too few; give at least 1")
    if not 1 <= guidance < float("inf"):
        raise ConfigError(f"generator: a guidance of {guidance:g} makes no sense; give 1 (none) or more")
    if named.kind in PICKLED and not trust_pickle:
        raise ConfigError(
            f"generator: {named.path} is a pickle, and opening a pickle runs whatever code its author put into "
            "it; if you trust where it came from, set trust-pickle=true"
        )
    if not named.path.exists():
        raise ConfigError(f"generator: {named.path} does not exist; give the path as this machine sees it")

    from espalier.training.trainer import resolve_device

    place = resolve_device(str(device))
    if named.kind == "gan":
        from espalier.generators.gan import GanGenerator

        return GanGenerator.open(named.path, place)
    if named.kind == "espalier":
        from espalier.generators.diffusion import DiffusionGenerator

        return DiffusionGenerator.open(named.path, place, steps)
    if named.kind == "sd":
        from espalier.generators.stable_diffusion import StableDiffusionGenerator

        return StableDiffusionGenerator.open(
            named.path, place, prompt=prompt, steps=steps, guidance=guidance, trust_pickle=trust_pickle
        )
    from espalier.generators.stylegan import StyleGanGenerator

    return StyleGanGenerator.open(named.path, place, classes=named.kind == "stylegan-xl")
