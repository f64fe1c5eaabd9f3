"""Arrangement of images in a grid."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from espalier import lazy

if TYPE_CHECKING:
    from PIL import Image
else:
    Image = lazy.load("PIL.Image")


def image_grid(
    images: Tensor, *, columns: int | None = None, smallest: int = 32, gap: int = 2
) -> Image.Image:
    """Arrange images in a grid.

    Parameters
    ----------
    images : Tensor
        [N, C, H, W] in [-1, 1], N >= 1; one channel is grey, three are RGB, otherwise the first is shown.
    columns : int, optional
        Images per row; by default the grid is about square.
    smallest : int
        Smaller images are enlarged to at least this many pixels per side, by an integer factor without
        interpolation.
    gap : int
        Width of the grey lines between and around the images, in pixels.

    Returns
    -------
    PIL.Image.Image
        In mode L or RGB.

    Raises
    ------
    ValueError
        The images have another shape, or there are none.
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"a grid needs images of shape [N, C, H, W], not {list(images.shape)}")
    images = images if images.shape[1] == 3 else images[:, :1]
    count, channels, height, width = images.shape
    factor = max(1, math.ceil(smallest / min(height, width)))
    pixels = images.detach().float().cpu().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    step_y, step_x = height * factor + gap, width * factor + gap
    canvas = torch.full((channels, rows * step_y + gap, columns * step_x + gap), 96, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + i // columns * step_y, gap + i % columns * step_x
        canvas[:, top : top + height * factor, left : left + width * factor] = image
    array = canvas[0].numpy() if channels == 1 else canvas.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array)
