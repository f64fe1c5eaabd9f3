"""Conversion of generated images to the clients' size, channels and value range."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from espalier.errors import ConfigError

#: ITU-R BT.601 luma, which Pillow uses to convert RGB to grey.
_LUMA = (0.299, 0.587, 0.114)


def fit(images: Tensor, size: int, channels: int) -> Tensor:
    """Convert images to a client's shape.

    The shorter side is resized to `size` (bilinear, antialiased), the longer side is cropped at the centre.

    Parameters
    ----------
    images : Tensor
        [N, 1 or 3, H, W]; values outside [-1, 1] are clamped.
    size, channels : int
        Height and width in pixels, and 1 (grey) or 3 (RGB) channels.

    Returns
    -------
    Tensor
        float32 [N, channels, size, size] in [-1, 1], on the CPU.

    Raises
    ------
    ConfigError
        The channels cannot be converted, or the size is not positive.
    """
    have = images.shape[1]
    if size < 1 or {have, channels} - {1, 3}:
        raise ConfigError(
            f"generator: images of {have} channels cannot become {channels} channels of {size}x{size} pixels; "
            "use grey or RGB data"
        )
    images = images.detach().float()
    if have == 3 and channels == 1:
        images = (images * images.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
    height, width = images.shape[-2:]
    if min(height, width) != size:
        ratio = size / min(height, width)
        shape = (max(size, round(height * ratio)), max(size, round(width * ratio)))
        images = torch.nn.functional.interpolate(
            images, shape, mode="bilinear", antialias=True, align_corners=False
        )
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    images = images[..., top : top + size, left : left + size]
    return images.expand(-1, channels, -1, -1).clamp(-1, 1).cpu().contiguous()


def in_batches(
    draw: Callable[[Tensor], Tensor], latents: Tensor, batch: int, size: int, channels: int
) -> Tensor:
    """Generate images in batches and convert them to a client's shape.

    Parameters
    ----------
    draw : callable
        Maps latents, float32 [n, H], to images [n, 1 or 3, height, width].
    latents : Tensor
        [N, H].
    batch, size, channels : int
        Images per batch; for the others see :func:`fit`.
    """
    drawn = [torch.empty(0, channels, size, size)]
    if len(latents):
        drawn += [fit(draw(part), size, channels) for part in torch.split(latents.detach().float(), batch)]
    return torch.cat(drawn)
