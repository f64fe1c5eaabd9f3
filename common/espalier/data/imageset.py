"""Labelled image sets: labels in memory, images fetched by index as floats in [-1, 1]."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from espalier import lazy
from espalier.errors import DataError

if TYPE_CHECKING:
    import torch
else:
    torch = lazy.load("torch")

CACHE_BYTES = 256 * 2**20
"""Default limit of the decoded pixels that a folder of images caches in memory."""

_DECODERS = 4


@runtime_checkable
class ImageSet(Protocol):
    """Labelled images of one shape; labels are known without decoding an image."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of each image, shape [N]."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order; a class may have no image here."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of each image."""

    @property
    def name(self) -> str:
        """Name of the data set: a known one, or a folder's own name, never a path."""

    def __len__(self) -> int: ...

    def fetch(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Return float32 images [B, C, H, W] in [-1, 1]; raises DataError if one cannot be read."""

    def subset(self, indices: NDArray[np.int64]) -> ImageSet:
        """Return the images at `indices`, in that order; the class names are unchanged."""


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """Map uint8 pixels to float32 in [-1, 1] (0 to -1, 255 to 1)."""
    return pixels.float().div_(127.5).sub_(1.0)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Map floats in [-1, 1] to uint8 pixels, rounded and clipped; the inverse of :func:`to_float`."""
    return images.float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(dtype=torch.uint8)


def _checked(indices: NDArray[np.int64], count: int, name: str) -> NDArray[np.int64]:
    indices = np.asarray(indices)
    if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
        raise DataError(f"data {name!r}: indices must be a vector of whole numbers")
    if indices.size and (indices.min() < 0 or indices.max() >= count):
        raise DataError(f"data {name!r}: an index lies outside 0 to {count - 1}")
    return indices.astype(np.int64, copy=False)


class TensorImages:
    """Images held in memory as uint8.

    Parameters
    ----------
    pixels : torch.Tensor
        uint8, shape [N, C, H, W].
    labels : ndarray
        Class of each image, shape [N], values in [0, len(classes)).
    classes : sequence of str
        Class names in label order.
    name : str
        Name of the data set.

    Raises
    ------
    DataError
        Shapes, types or labels are inconsistent.
    """

    def __init__(
        self, pixels: torch.Tensor, labels: NDArray[np.int64], classes: Sequence[str], name: str
    ) -> None:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4:
            got = f"{pixels.dtype} {tuple(pixels.shape)}"
            raise DataError(f"data {name!r}: pixels must be uint8 [N, C, H, W], not {got}")
        self.labels = _check_labels(labels, len(pixels), len(classes), name)
        self.classes = tuple(classes)
        self.name = name
        self.pixels = pixels

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Return float32 images [B, C, H, W] in [-1, 1]."""
        return to_float(self._select(indices))

    def subset(self, indices: NDArray[np.int64]) -> TensorImages:
        """Return a copy of the images at `indices`, so that the rest can be freed."""
        indices = _checked(indices, len(self), self.name)
        return TensorImages(self._select(indices), self.labels[indices], self.classes, self.name)

    def _select(self, indices: NDArray[np.int64]) -> torch.Tensor:
        # `pixels[rows]` copies single bytes; this copies whole images, 6 to 20 times as fast.
        return self.pixels.index_select(0, torch.from_numpy(_checked(indices, len(self), self.name)))


class FileImages:
    """Images on disk: decoded, resized and centre-cropped when fetched, and cached up to a memory limit.

    Parameters
    ----------
    files : sequence of Path
        One file per image.
    labels : ndarray
        Class of each file, shape [N].
    classes : sequence of str
        Class names in label order.
    name : str
        Name of the data set.
    channels : int
        1 for grey, 3 for RGB.
    size : int
        Height and width after resizing, in pixels.
    cache_bytes : int
        Limit of the decoded pixels in memory, shared with every subset.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: NDArray[np.int64],
        classes: Sequence[str],
        name: str,
        *,
        channels: int,
        size: int,
        cache_bytes: int = CACHE_BYTES,
        _cache: _PixelCache | None = None,
    ) -> None:
        if channels not in (1, 3):
            raise DataError(f"data {name!r}: images have 1 (grey) or 3 (RGB) channels, not {channels}")
        if size < 1:
            raise DataError(f"data {name!r}: the image size must be at least 1 pixel, not {size}")
        self.files = tuple(files)
        self.labels = _check_labels(labels, len(self.files), len(classes), name)
        self.classes = tuple(classes)
        self.name = name
        self.shape = (channels, size, size)
        self._cache = _cache if _cache is not None else _PixelCache(cache_bytes)

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """Return float32 images [B, C, H, W] in [-1, 1]; a DataError names a file that cannot be read."""
        files = [self.files[i] for i in _checked(indices, len(self), self.name)]
        images = {file: image for file in files if (image := self._cache.get(file)) is not None}
        missing = [file for file in dict.fromkeys(files) if file not in images]
        if missing:
            with ThreadPoolExecutor(_DECODERS) as pool:
                images.update(zip(missing, pool.map(self._decode, missing), strict=True))
        pixels = np.empty((len(files), *self.shape), np.uint8)
        for row, file in enumerate(files):
            pixels[row] = images[file]
        return to_float(torch.from_numpy(pixels))

    def subset(self, indices: NDArray[np.int64]) -> FileImages:
        """Return the images at `indices`; the cache is shared."""
        indices = _checked(indices, len(self), self.name)
        return FileImages(
            [self.files[i] for i in indices],
            self.labels[indices],
            self.classes,
            self.name,
            channels=self.shape[0],
            size=self.shape[1],
            _cache=self._cache,
        )

    def _decode(self, file: Path) -> NDArray[np.uint8]:
        image = decode(file, channels=self.shape[0], size=self.shape[1])
        self._cache.put(file, image)
        return image


def decode(file: Path, *, channels: int, size: int) -> NDArray[np.uint8]:
    """Read one image file as uint8 [C, size, size]: upright by its EXIF tag, centre square, resized.

    Raises
    ------
    DataError
        The file is missing, truncated or not an image; the message names it.
    """
    from PIL import Image, ImageOps

    mode = "L" if channels == 1 else "RGB"
    try:
        with Image.open(file) as image:
            image.draft(mode, (size, size))  # the JPEG decoder skips resolution that is not needed
            upright = ImageOps.exif_transpose(image)
            square = ImageOps.fit(upright.convert(mode), (size, size), method=Image.Resampling.BICUBIC)
            pixels = np.asarray(square, np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"image {file} cannot be read ({error}); remove it or replace it") from error
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


class _PixelCache:
    """A cache of decoded images without eviction: in an epoch, every evicted image would be a miss later."""

    def __init__(self, cap: int) -> None:
        self._cap = cap
        self._held = 0
        self._images: dict[Path, NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    def get(self, file: Path) -> NDArray[np.uint8] | None:
        return self._images.get(file)

    def put(self, file: Path, image: NDArray[np.uint8]) -> None:
        with self._lock:
            if file not in self._images and self._held + image.nbytes <= self._cap:
                self._images[file] = image
                self._held += image.nbytes


def _check_labels(labels: NDArray[np.int64], count: int, classes: int, name: str) -> NDArray[np.int64]:
    labels = np.asarray(labels, np.int64)
    if labels.shape != (count,):
        raise DataError(f"data {name!r}: {count} images but labels of shape {labels.shape}")
    if count and (labels.min() < 0 or labels.max() >= classes):
        raise DataError(f"data {name!r}: a label lies outside 0 to {classes - 1}")
    return labels


def batches(data: ImageSet, size: int = 256) -> Iterator[torch.Tensor]:
    """Yield every image of `data` once, in order, float32 [<= size, C, H, W]."""
    for start in range(0, len(data), size):
        yield data.fetch(np.arange(start, min(start + size, len(data)), dtype=np.int64))
