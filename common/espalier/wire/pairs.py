"""Pairs of a generated image and the target vector for its features, which FedKTL's cloud sends to clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from espalier.errors import WireError
from espalier.wire.sections import SectionId

#: Section of a payload and its tensors.
PAIRS = SectionId("pairs")
IMAGES, CENTROIDS = "images", "centroids"


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Return images in [-1, 1] as uint8, a quarter of the bytes of float32; values outside are clipped."""
    return np.clip(np.rint((images + 1.0) * 127.5), 0, 255).astype(np.uint8)


def from_pixels(pixels: np.ndarray) -> np.ndarray:
    """Return uint8 pixels as float32 images in [-1, 1]."""
    return (pixels.astype(np.float32) / np.float32(127.5)) - np.float32(1.0)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Images and their centroids, one pair per class of a client.

    Attributes
    ----------
    images : numpy.ndarray
        [n, channels, size, size]: float32 in [-1, 1], or uint8 pixels.
    centroids : numpy.ndarray
        float32 [n, H].
    """

    images: np.ndarray
    centroids: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the section's tensors."""
        return {IMAGES: self.images, CENTROIDS: self.centroids}

    def floats(self) -> np.ndarray:
        """Return the images as float32 in [-1, 1]."""
        return from_pixels(self.images) if self.images.dtype == np.uint8 else self.images

    @classmethod
    def received(
        cls, arrays: Mapping[str, np.ndarray], shape: tuple[int, int, int], sender: str
    ) -> Self | None:
        """Read and check the pairs of a payload; None if there are none.

        Parameters
        ----------
        arrays : mapping of str to numpy.ndarray
            The section's tensors by name; {} if the payload has no such section.
        shape : tuple of int
            The client's images: channels, height, width.
        sender : str
            Name of the sender, for error messages.

        Raises
        ------
        WireError
            If the images have another size or dtype, the centroids another number or dtype, or a value is not finite or
            outside its range.
        """
        if IMAGES not in arrays or not len(arrays[IMAGES]):
            return None
        images = arrays[IMAGES]
        if images.dtype not in (np.float32, np.uint8) or images.shape[1:] != shape:
            raise WireError(
                sender,
                f"generated images {images.dtype} {list(images.shape[1:])}, expected float32 or uint8 "
                f"{list(shape)}",
            )
        centroids = arrays.get(CENTROIDS)
        if centroids is None or centroids.dtype != np.float32 or centroids.ndim != 2:
            raise WireError(sender, "generated images without float32 centroids [pairs, latent dimension]")
        if len(centroids) != len(images) or not centroids.shape[1]:
            raise WireError(sender, f"{len(centroids)} centroids for {len(images)} generated images")
        if not np.isfinite(centroids).all():
            raise WireError(sender, "centroids that are not finite")
        # NaN fails this comparison, too.
        if images.dtype == np.float32 and not (np.abs(images) <= 1.0 + 1e-3).all():
            raise WireError(sender, "generated images outside [-1, 1]")
        return cls(images, centroids)
