"""The small GAN of `espalier pretrain-generator`: its files (safetensors and JSON), and its use as a generator."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from espalier.errors import ConfigError, StateError
from espalier.generators.base import Options
from espalier.storage.atomic import replacing_folder, write_error
from espalier_server.generators.images import in_batches
from espalier_server.generators.networks import GanConfig, StyleGenerator

WEIGHTS, INDEX, GRID = "generator.safetensors", "generator.json", "samples.png"
_KIND, _FORMAT = "espalier-gan", 1
_BATCH = 64


class GanGenerator:
    """A trained GAN as a :class:`~espalier.generators.base.Generator`.

    A latent is a style vector w: the mapping network's output for normal noise and a random class.

    Parameters
    ----------
    network : StyleGenerator
        The network; it is frozen.
    device : torch.device
        Device to compute on.
    notes : mapping, optional
        Notes about its training.
    """

    def __init__(
        self, network: StyleGenerator, device: torch.device, notes: Mapping[str, Any] | None = None
    ) -> None:
        self.network = network.eval().requires_grad_(False).to(device)
        self.device, self.notes = device, dict(notes or {})

    @classmethod
    def open(cls, folder: Path, options: Options) -> GanGenerator:
        """Open a folder that :func:`save_gan` wrote.

        Raises
        ------
        ConfigError
            The folder holds no such generator.
        StateError
            A file is missing or damaged; the message names it.
        """
        return cls(*load_gan(folder, options.device))

    @property
    def latent_dim(self) -> int:
        """Length of a w."""
        return self.network.config.latent_dim

    @torch.no_grad()
    def sample_latents(self, count: int, rng: torch.Generator) -> Tensor:
        """Draw w's; see :class:`~espalier.generators.base.Generator`."""
        z = torch.randn(count, self.latent_dim, generator=rng)
        classes = torch.randint(self.network.config.classes, (count,), generator=rng)
        w: Tensor = self.network.mapping(z.to(self.device), classes.to(self.device))
        return w.cpu()

    @torch.no_grad()
    def synthesise(self, latents: Tensor, size: int, channels: int) -> Tensor:
        """Draw images; see :class:`~espalier.generators.base.Generator`."""
        return in_batches(
            lambda part: self.network.synthesis(part.to(self.device)), latents, _BATCH, size, channels
        )


def save_gan(folder: Path, network: StyleGenerator, notes: Mapping[str, Any], grid: Any) -> None:
    """Write a generator's folder atomically; an existing generator in it is replaced.

    Parameters
    ----------
    folder : Path
        Folder to write; see :func:`check_out`.
    network : StyleGenerator
        On any device.
    notes : mapping
        JSON values about its training.
    grid : PIL.Image.Image
        Sample images.

    Raises
    ------
    ConfigError
        The folder holds something else.
    StateError
        The folder cannot be written to.
    """
    check_out(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    index = {"kind": _KIND, "format": _FORMAT, "config": asdict(network.config), "training": dict(notes)}
    try:
        with replacing_folder(folder) as new:
            save_file(tensors, new / WEIGHTS)
            (new / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
            grid.save(new / GRID, format="PNG")
    except SafetensorError as error:
        raise write_error(folder, error) from error


def check_out(folder: Path) -> None:
    """Check that a folder does not exist, is empty or holds a generator that may be replaced.

    Raises
    ------
    ConfigError
        The folder holds something else.
    """
    if not folder.exists():
        return
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - {WEIGHTS, INDEX, GRID}:
        raise ConfigError(f"--out: {folder} exists and is no generator's folder; give a new folder")


def load_gan(folder: Path, device: torch.device) -> tuple[StyleGenerator, torch.device, dict[str, Any]]:
    """Read a generator that :func:`save_gan` wrote.

    Returns
    -------
    StyleGenerator
        The network, on the CPU.
    torch.device
        The argument `device`.
    dict
        The notes about its training.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"generator: {folder} holds no {INDEX}; make a generator with `espalier pretrain-generator`"
        ) from None
    except (OSError, ValueError) as error:
        raise _damaged(folder / INDEX, error) from error
    if not isinstance(index, dict) or (index.get("kind"), index.get("format")) != (_KIND, _FORMAT):
        raise ConfigError(f"generator: {folder / INDEX} does not describe an {_KIND} of format {_FORMAT}")
    try:
        network = StyleGenerator(GanConfig(**index["config"]), torch.Generator())
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder / INDEX, error) from error
    try:
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise _damaged(folder / WEIGHTS, error) from error
    notes = index.get("training")
    return network, device, notes if isinstance(notes, dict) else {}


def _damaged(file: Path, reason: Exception) -> StateError:
    state = "is damaged" if file.exists() else "is missing"
    return StateError(f"{file} {state} ({reason}); make it again with `espalier pretrain-generator`")
