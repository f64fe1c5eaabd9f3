"""StyleGAN3 and StyleGAN-XL as generators, from pickles, which execute code when they are opened."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import ConfigError
from espalier.generators.base import Options
from espalier_server.generators.images import in_batches

_BATCH = 4  # as in the authors' code of FedKTL; it affects memory only
_NEEDED = ("mapping", "synthesis", "num_ws", "z_dim", "c_dim")


class StyleGanGenerator:
    """A network with StyleGAN's interface as a :class:`~espalier.generators.base.Generator`.

    A latent is a w of the mapping without truncation: the first of the ``num_ws`` equal rows that it returns.
    For synthesis it is repeated for every layer, with constant noise.

    Parameters
    ----------
    network : nn.Module
        Has ``mapping(z, c, truncation_psi=)``, ``synthesis(ws, noise_mode=)``, ``num_ws``, ``z_dim``, ``c_dim``.
    device : torch.device
        Device to compute on.
    classes : bool
        Whether the network is conditional (StyleGAN-XL): each z is then mapped with a random class.

    Raises
    ------
    ConfigError
        The network has another interface, or `classes` does not match it.
    """

    def __init__(self, network: nn.Module, device: torch.device, *, classes: bool) -> None:
        missing = [name for name in _NEEDED if not hasattr(network, name)]
        if missing:
            raise ConfigError(
                f"generator: the network has no {', '.join(missing)}; give the pickle of a StyleGAN3 or "
                "StyleGAN-XL"
            )
        frozen: Any = network.eval().requires_grad_(False).to(device)
        labelled = int(frozen.c_dim)
        self.network = frozen
        self.device, self.classes = device, labelled if classes else 0
        if classes and self.classes < 1:
            raise ConfigError(
                "generator: the network has no classes; write stylegan3: in place of stylegan-xl:"
            )
        if not classes and labelled:
            raise ConfigError("generator: the network has classes; write stylegan-xl: in place of stylegan3:")
        # StyleGAN-XL's attribute for the width of w excludes the class embedding, so read it from a sample.
        self._latent_dim = self.sample_latents(1, torch.Generator().manual_seed(0)).shape[1]

    @classmethod
    def open(cls, file: Path, options: Options, *, classes: bool) -> StyleGanGenerator:
        """Unpickle a network. This executes code in the file: the caller has checked ``trust-pickle``.

        Parameters
        ----------
        file : Path
            A pickle of the network, or of a dictionary that has it as ``G_ema`` or ``G``.
        options : Options
            Its device is used.
        classes : bool
            See the class.

        Raises
        ------
        ConfigError
            The file cannot be opened, or holds no such network.
        """
        try:
            with file.open("rb") as stream:
                content = pickle.load(stream)
        except ImportError as error:
            raise ConfigError(
                f"generator: {file} needs the module {error.name!r}; put the code that it was trained with "
                "(torch_utils and dnnlib of NVIDIA's repository) on PYTHONPATH"
            ) from error
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError) as error:
            raise ConfigError(f"generator: {file} cannot be unpickled: {error}") from error
        if isinstance(content, dict):
            content = content.get("G_ema") or content.get("G")
        if not isinstance(content, nn.Module):
            raise ConfigError(f"generator: {file} holds neither a network nor one named G_ema or G")
        return cls(content, options.device, classes=classes)

    @property
    def latent_dim(self) -> int:
        """Length of a w."""
        return self._latent_dim

    @torch.no_grad()
    def sample_latents(self, count: int, rng: torch.Generator) -> Tensor:
        """Draw w's; see :class:`~espalier.generators.base.Generator`."""
        z = torch.randn(count, self.network.z_dim, generator=rng).to(self.device)
        c = None
        if self.classes:
            chosen = torch.randint(self.classes, (count,), generator=rng)
            c = torch.nn.functional.one_hot(chosen, self.classes).float().to(self.device)
        rows: Tensor = self.network.mapping(z, c, truncation_psi=1)
        if rows.ndim != 3 or len(rows) != count:
            raise ConfigError(
                f"generator: the mapping returns {list(rows.shape)} in place of [{count}, layers, width]; give "
                "the pickle of a StyleGAN3 or StyleGAN-XL"
            )
        return rows[:, 0].float().cpu()

    @torch.no_grad()
    def synthesise(self, latents: Tensor, size: int, channels: int) -> Tensor:
        """Draw images; see :class:`~espalier.generators.base.Generator`."""

        def draw(part: Tensor) -> Tensor:
            rows = part.to(self.device)[:, None].repeat(1, self.network.num_ws, 1)
            images: Tensor = self.network.synthesis(rows, noise_mode="const")
            return images

        return in_batches(draw, latents, _BATCH, size, channels)


def open_stylegan_xl(file: Path, options: Options) -> StyleGanGenerator:
    """Open the pickle of a class-conditional network; see `StyleGanGenerator.open`."""
    return StyleGanGenerator.open(file, options, classes=True)


def open_stylegan3(file: Path, options: Options) -> StyleGanGenerator:
    """Open the pickle of an unconditional network; see `StyleGanGenerator.open`."""
    return StyleGanGenerator.open(file, options, classes=False)
