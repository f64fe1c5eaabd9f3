"""The interface of a pre-trained image generator for FedKTL, and opening the one that a setting names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from pydantic import Field

from espalier.config.fields import PositiveInt, SettingsGroup
from espalier.distribution import entry_points
from espalier.errors import ConfigError
from espalier.training.device import resolve_device

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    import torch
    from torch import Tensor

GENERATORS = "espalier.generators"
"""Entry-point group of the kinds of generators: functions of a path and `Options` that return a `Generator`."""

_PATHS = {
    "gan": "FOLDER",
    "espalier": "MODEL_FOLDER",
    "stylegan-xl": "FILE.pkl",
    "stylegan3": "FILE.pkl",
    "sd": "FOLDER",
}

PICKLED = ("stylegan-xl", "stylegan3")
"""Kinds whose files execute code when they are opened."""


class GeneratorSettings(SettingsGroup):
    """Which generator the cloud opens."""

    cloud_only: ClassVar[frozenset[str]] = frozenset({"generator"})

    generator: str = Field(
        default="",
        description="the generator at the cloud: gan:DIR, espalier:DIR, sd:DIR, stylegan-xl:FILE or stylegan3:FILE",
    )


class DenoisingSettings(SettingsGroup):
    """How a diffusion generator draws."""

    generator_steps: PositiveInt = Field(default=50, description="denoising steps of a diffusion generator")


class PromptSettings(SettingsGroup):
    """What Stable Diffusion draws."""

    prompt: str = Field(default="a cat", description="prompt of Stable Diffusion, the same for every class")


class TrustSettings(SettingsGroup):
    """Whether files may be opened that can execute code."""

    trust_pickle: bool = Field(
        default=False, description="open pickles, which can execute code on the cloud's machine"
    )


class Generator(Protocol):
    """A pre-trained, frozen image generator (FedKTL, Zhang et al., CVPR 2024, arXiv 2403.15760).

    FedKTL's feature transformer maps class prototypes to the distribution of the generator's latents; clients train
    on the images that the generator synthesises from them.

    Attributes
    ----------
    latent_dim : int
        H, the length of one latent, flattened.
    """

    @property
    def latent_dim(self) -> int: ...  # noqa: D102

    def sample_latents(self, count: int, rng: torch.Generator) -> Tensor:
        """Draw latents from the distribution that the feature transformer is trained to match.

        Parameters
        ----------
        count : int
            Number of latents.
        rng : torch.Generator
            The only source of randomness; on the CPU, so that the draw does not depend on the device.

        Returns
        -------
        Tensor
            float32 [count, H], on the CPU.
        """

    def synthesise(self, latents: Tensor, size: int, channels: int) -> Tensor:
        """Synthesise images from latents, deterministically.

        Parameters
        ----------
        latents : Tensor
            float32 [count, H], on any device.
        size : int
            Height and width of the wanted images in pixels.
        channels : int
            1 (grey) or 3 (RGB).

        Returns
        -------
        Tensor
            float32 [count, channels, size, size] in [-1, 1], on the CPU: resized, cropped to the centre, and
            converted to grey or RGB if the generator's own images differ.
        """


@dataclass(frozen=True)
class Options:
    """How to open a generator; each kind uses what applies to it. See :func:`open_generator`."""

    device: torch.device
    prompt: str = "a cat"
    steps: int = 50
    guidance: float = 7.5
    trust_pickle: bool = False


@dataclass(frozen=True)
class GeneratorSpec:
    """A parsed SPEC: a kind of generator and the path of its file or folder."""

    kind: str
    path: Path


def parse_generator(spec: str) -> GeneratorSpec:
    """Read a generator SPEC, without opening anything.

    Parameters
    ----------
    spec : str
        ``KIND:PATH``; the kinds are the entry points of `GENERATORS`.

    Raises
    ------
    ConfigError
        The kind is unknown or the path is missing.
    """
    kind, colon, path = spec.strip().partition(":")
    if not colon or kind not in _openers() or not path.strip():
        raise ConfigError(f"generator: {spec!r} is not understood; give one of {_grammar()}")
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
        Whether files that execute code may be opened: StyleGAN's pickles, and weights of Stable Diffusion that are
        not safetensors.
    device : torch.device or str
        Device of the generator; "auto" is a GPU if there is one.
    prompt : str
        Prompt of Stable Diffusion, the same for every class.
    steps : int
        Denoising steps of ``sd`` and ``espalier``.
    guidance : float
        Classifier-free guidance of ``sd``; 1 is none.

    Raises
    ------
    ConfigError
        The SPEC does not parse, an option is out of range, the path does not exist or holds another kind, or
        opening it would execute code without `trust_pickle`.
    StateError
        A folder that Espalier wrote is damaged.
    """
    named = parse_generator(spec)
    if steps < 1:
        raise ConfigError(f"generator: {steps} denoising steps are too few; give at least 1")
    if not 1 <= guidance < float("inf"):
        raise ConfigError(f"generator: a guidance of {guidance:g} is out of range; give 1 (none) or more")
    if named.kind in PICKLED and not trust_pickle:
        raise ConfigError(
            f"generator: {named.path} is a pickle, and opening a pickle runs whatever code its author put into "
            "it; if you trust where it came from, set trust-pickle=true"
        )
    if not named.path.exists():
        raise ConfigError(f"generator: {named.path} does not exist on this machine")

    options = Options(resolve_device(str(device)), prompt, steps, guidance, trust_pickle)
    opened: Generator = _openers()[named.kind].load()(named.path, options)
    return opened


def _openers() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(GENERATORS)}


def _grammar() -> str:
    return ", ".join(f"{kind}:{_PATHS.get(kind, 'PATH')}" for kind in _openers())
