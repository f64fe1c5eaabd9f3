"""The grid of sample images."""

from __future__ import annotations

import pytest
import torch

from espalier_server.evaluation.image_grid import image_grid


def test_a_grid_shows_every_image_in_its_place() -> None:
    images = torch.stack([torch.full((1, 2, 2), v) for v in (-1.0, 0.0, 1.0)])
    picture = image_grid(images, columns=2, smallest=4, gap=1)
    assert (picture.mode, picture.size) == ("L", (11, 11))
    assert [picture.getpixel(at) for at in ((1, 1), (6, 1), (1, 6), (6, 6), (0, 0))] == [0, 128, 255, 96, 96]
    assert image_grid(torch.zeros(1, 3, 40, 40)).mode == "RGB"
    with pytest.raises(ValueError, match="a grid needs images"):
        image_grid(torch.zeros(0, 1, 2, 2))
