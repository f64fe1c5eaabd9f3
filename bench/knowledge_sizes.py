"""Payload sizes of knowledge exchange by formula, in bytes or bits, to compare with the record's counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Bytes of a float32; bits of a float and of a grey value as Jeong et al. count them.
FLOAT = 4
_FLOAT_BITS, _PIXEL_BITS = 32, 8


def table_bytes(classes: int, dimension: int) -> int:
    """Return the bytes of a whole class table's vectors: C x C values for FD, C x D for FedProto."""
    return FLOAT * classes * dimension


def pair_bytes(pairs: int, image_shape: Sequence[int], latent_dim: int, *, pixel_bytes: int = FLOAT) -> int:
    """Return the bytes of FedKTL's image-vector pairs in a downlink message.

    Parameters
    ----------
    pairs : int
        Number of classes that any client holds.
    image_shape : sequence of int
        Channels, height, width.
    latent_dim : int
        H, the length of a centroid.
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
    this formula gives their totals exactly.

    Parameters
    ----------
    seeds : int
        Images uploaded.
    pixels : int
        Grey values of an image.
    parameters : int
        Number of parameters of the generator.
    """
    return seeds * pixels * _PIXEL_BITS + parameters * _FLOAT_BITS
