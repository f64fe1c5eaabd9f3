"""Images of generators fitted to the size and channels of the data."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from espalier_server.generators.images import fit


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
