"""What knowledge exchange puts on the links by formula: beside these numbers the ledger's are read."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Bytes of a float32, and bits of what Jeong et al. count: floats and grey values.
FLOAT = 4
_FLOAT_BITS, _PIXEL_BITS = 32, 8


def table_bytes(classes: int, dimension: int) -> int:
    """Return the bytes of a whole class table's vectors: C x C values for FD, C x D for FedProto."""
    return FLOAT * classes * dimension


def pair_bytes(pairs: int, image_shape: Sequence[int], latent_dim: int, *, pixel_bytes: int = FLOAT) -> int:
    """Return the bytes of FedKTL's pairs on their way down.

    Parameters
    ----------
    pairs : int
        Classes that somebody holds.
    image_shape : sequence of int
        Channels, height, width.
    latent_dim : int
        H, length of a centroid.
    pixel_bytes : int
        4 for float32 images, 1 for uint8.
    """
    return pairs * (math.prod(image_shape) * pixel_bytes + FLOAT * latent_dim)


def weights_bits(parameters: int, rounds: int) -> int:
    """Return the bits that a device exchanges in federated learning: all parameters, up and down, every round."""
    return 2 * rounds * parameters * _FLOAT_BITS


def soft_labels_bits(classes: int, rounds: int) -> int:
    """Return the bits that a device exchanges in FD: C x C values, up and down, every round."""
    return 2 * rounds * classes * classes * _FLOAT_BITS


def augmentation_bits(seeds: int, pixels: int, parameters: int) -> int:
    """Return the bits of FAug for a device: seeds up, once, and the generator down, once.

    Jeong et al. 2018 (arXiv 1811.11479, table 1) count 8 bits a pixel, 32 a float and nothing for a seed's label;
    so their totals come out to the bit.

    Parameters
    ----------
    seeds : int
        Images uploaded.
    pixels : int
        Grey values of an image.
    parameters : int
        Of the generator.
    """
    return seeds * pixels * _PIXEL_BITS + parameters * _FLOAT_BITS
