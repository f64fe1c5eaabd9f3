"""The U-Nets that Espalier trains: presets of diffusers' UNet2DModel, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from espalier.errors import ConfigError
from espalier.models.unet_family import assemble

if TYPE_CHECKING:
    from diffusers import UNet2DModel


@dataclass(frozen=True)
class Preset:
    """Widths and blocks of one U-Net.

    Attributes
    ----------
    widths : tuple of int
        Channels at each resolution; each resolution is half of the one before.
    attention : tuple of bool
        Whether the blocks of that resolution have attention.
    layers : int
        Residual blocks per resolution and direction.
    groups : int
        Groups of every GroupNorm. Pruning removes whole groups' worth of channels (one of each group at
        once), so ``width / groups`` is the granularity of what it can do.
    head_dim : int or None
        Channels per attention head; None: one head per layer.
    dropout : float
        Dropout within residual blocks, for images of 32 pixels or fewer.
    """

    widths: tuple[int, ...]
    attention: tuple[bool, ...]
    layers: int
    groups: int
    head_dim: int | None = 8
    dropout: float = 0.0

    @property
    def multiple(self) -> int:
        """The number that the image size must be a multiple of."""
        return int(2 ** (len(self.widths) - 1))

    def config(self, channels: int, size: int) -> dict[str, Any]:
        """Return the UNet2DModel's constructor arguments for [channels, size, size] images."""
        down = tuple("AttnDownBlock2D" if attends else "DownBlock2D" for attends in self.attention)
        up = tuple("AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(self.attention))
        return {
            "sample_size": size,
            "in_channels": channels,
            "out_channels": channels,
            "block_out_channels": self.widths,
            "layers_per_block": self.layers,
            "down_block_types": down,
            "up_block_types": up,
            "attention_head_dim": self.head_dim,
            "norm_num_groups": self.groups,
            "dropout": self.dropout if size <= 32 else 0.0,
        }


PRESETS: Mapping[str, Preset] = {
    # 8x8 digits on one CPU core: 1.09 M parameters. 5 and 10 channels per group, so a ratio of 0.2 is exact;
    # few wide heads, because many narrow ones take a tenth of a step's time at 16 pixels.
    "unet-tiny": Preset(widths=(40, 80), attention=(False, True), layers=1, groups=8, head_dim=20),
    # 28 and 32 pixels: 5.3 M parameters, two halvings (28 -> 14 -> 7). One head per layer, as in DDPM (Ho et al.
    # 2020): attention costs by the head, and narrower ones cost a pruned network as much as a dense one.
    "unet-small": Preset(
        widths=(64, 96, 128), attention=(False, True, False), layers=2, groups=8, head_dim=None
    ),
    # FedPhD's net (arXiv 2507.06449): 35.75 M parameters, 6.06 GMACs at 32 pixels, dropout 0.1 for CIFAR-10.
    "unet-paper": Preset(
        widths=(128, 256, 256, 256), attention=(False, True, False, False), layers=2, groups=32, dropout=0.1
    ),
}


def unet(preset: str, channels: int, size: int) -> UNet2DModel:
    """Build a U-Net with random weights; drawn from torch's global generator.

    Parameters
    ----------
    preset : str
        ``"unet-tiny"``, ``"unet-small"`` or ``"unet-paper"``.
    channels : int
        Image channels, at input and output.
    size : int
        Image height and width in pixels.

    Returns
    -------
    UNet2DModel
        On the CPU, in float32, in training mode.

    Raises
    ------
    ConfigError
        The preset is unknown or cannot take images of this size.
    """
    try:
        chosen = PRESETS[preset]
    except KeyError:
        known = ", ".join(PRESETS)
        raise ConfigError(f"model: {preset!r} is unknown; known models are {known}") from None
    if channels < 1:
        raise ConfigError(f"model: images need at least one channel, not {channels}")
    if size < 1 or size % chosen.multiple:
        fitting = [
            name for name, other in PRESETS.items() if size >= other.multiple and size % other.multiple == 0
        ]
        advice = f"; {' or '.join(fitting)} takes it" if fitting else "; resize the images"
        raise ConfigError(
            f"model: {preset} needs an image size that is a multiple of {chosen.multiple}, not {size}{advice}"
        )
    return assemble(chosen.config(channels, size)).train()
