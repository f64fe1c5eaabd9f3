"""A client's own images with some that it was given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from espalier import lazy
from espalier.data.imageset import ImageSet, TensorImages
from espalier.errors import DataError

if TYPE_CHECKING:
    import torch
else:
    torch = lazy.load("torch")


class Joined:
    """Two image sets of one shape and the same classes, one after the other."""

    def __init__(self, first: ImageSet, second: ImageSet) -> None:
        if first.shape != second.shape or first.classes != second.classes:
            raise DataError(
                f"data {second.name!r} ({list(second.shape)}, {len(second.classes)} classes) does not match "
                f"{first.name!r} ({list(first.shape)}, {len(first.classes)} classes)"
            )
        self._parts = (first, second)
        self.labels: NDArray[np.int64] = np.concatenate([first.labels, second.labels])
        self.classes, self.shape, self.name = first.classes, first.shape, first.name

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Return float32 images [B, C, H, W] in [-1, 1]."""
        first, second = self._parts
        own = indices < len(first)
        images = torch.empty((len(indices), *self.shape))
        for part, chosen, offset in ((first, own, 0), (second, ~own, len(first))):
            if chosen.any():
                images[torch.from_numpy(np.flatnonzero(chosen))] = part.fetch(indices[chosen] - offset)
        return images

    def subset(self, indices: NDArray[np.int64]) -> ImageSet:
        """Return the images at `indices`, those of the first set first."""
        indices = np.asarray(indices)
        first, second = self._parts
        own = indices[indices < len(first)], indices[indices >= len(first)] - len(first)
        return Joined(first.subset(own[0]), second.subset(own[1]))


def with_pixels(own: ImageSet, pixels: np.ndarray, labels: np.ndarray) -> ImageSet:
    """Return a set joined with uint8 images [N, C, H, W] and their labels [N]."""
    given = TensorImages(torch.from_numpy(np.array(pixels)), np.array(labels), own.classes, own.name)
    return Joined(own, given)
