"""Named data sets and folders of images, opened whole, before partitioning."""

from __future__ import annotations

import gzip
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from espalier import lazy
from espalier.data.imageset import FileImages, ImageSet, TensorImages
from espalier.distribution import install_command
from espalier.errors import DataError
from espalier.seeds import rng_for
from espalier.torchvision_shim import import_torchvision

if TYPE_CHECKING:
    import torch
else:
    torch = lazy.load("torch")

Split = Literal["train", "test"]

FOLDER_SIZE = 32
"""Default height and width of the images of a folder, in pixels."""

SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))

_DIGITS = tuple(str(digit) for digit in range(10))
_PEEK = 64


@dataclass(frozen=True)
class Source:
    """Where and how to open a named data set: `root` holds the data files, `size` is in pixels."""

    split: Split
    root: Path
    download: bool
    size: int | None


def default_root() -> Path:
    """Return the folder of data files: ESPALIER_DATA, or ``espalier/data`` in the user's cache folder."""
    given = os.environ.get("ESPALIER_DATA")
    if given:
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "espalier" / "data"


def _digits(source: Source) -> ImageSet:
    """Open scikit-learn's 1,797 digits, 8x8 grey: 1,437 to train, 360 to test, each class alike."""
    # The file is read directly: importing scikit-learn costs a resident client 80 MB for one small table.
    spec = importlib.util.find_spec("sklearn")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    file = folder / "datasets" / "data" / "digits.csv.gz" if folder else None
    if file is None or not file.is_file():
        raise DataError(
            "the data set 'digits' is part of scikit-learn, which is not installed; "
            f"run: {install_command('testbed')}"
        )
    with gzip.open(file, "rt") as table:
        rows = np.loadtxt(table, delimiter=",", dtype=np.int64)
    pixels = np.rint(rows[:, :64].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)  # 0..16 in the file
    whole = TensorImages(torch.from_numpy(pixels), rows[:, 64], _DIGITS, "digits")
    train, test = stratified_fifth(whole.labels, "digits")
    return _resized(whole.subset(train if source.split == "train" else test), source.size)


def stratified_fifth(labels: NDArray[np.int64], name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split into four fifths for training and a fifth for testing, stratified by class; depends on `name` only."""
    shuffled = rng_for(0, name, 0, "split").permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    test = np.zeros(len(labels), bool)
    test[by_class[::5]] = True
    return np.flatnonzero(~test), np.flatnonzero(test)


def _torchvision(
    name: str, class_name: str, classes: tuple[str, ...] | None, files: str
) -> Callable[[Source], ImageSet]:
    def open_it(source: Source) -> ImageSet:
        made = _opened(name, class_name, files, source, train=source.split == "train")
        pixels = torch.as_tensor(made.data)
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        names = classes if classes is not None else tuple(made.classes)
        return _resized(TensorImages(pixels, np.asarray(made.targets, np.int64), names, name), source.size)

    return open_it


def _celeba(source: Source) -> ImageSet:
    """Open CelebA in four classes, 2 * Male + Young (FedPhD's labels), by default at 64 pixels."""
    made = _opened("celeba", "CelebA", "celeba", source, split=source.split, target_type="attr")
    male, young = (made.attr[:, list(made.attr_names).index(column)].numpy() for column in ("Male", "Young"))
    folder = source.root / "celeba" / "img_align_celeba"
    return FileImages(
        [folder / file for file in made.filename],
        2 * male + young,
        ("female, older", "female, young", "male, older", "male, young"),
        "celeba",
        channels=3,
        size=source.size or 64,
    )


def _opened(name: str, class_name: str, files: str, source: Source, **choice: Any) -> Any:
    """Construct a torchvision data set; a missing file becomes an error that names its folder."""
    datasets = import_torchvision().datasets
    try:
        return getattr(datasets, class_name)(str(source.root), download=source.download, **choice)
    except (RuntimeError, OSError) as error:
        if source.download:
            raise DataError(f"data {name!r} could not be downloaded to {source.root}: {error}") from error
        raise DataError(
            f"data {name!r} is missing or incomplete in {source.root / files}: set ESPALIER_DATA to the "
            f"folder that holds {files!r}, or ESPALIER_DOWNLOAD=1 to download it there"
        ) from error


def _resized(data: TensorImages, size: int | None) -> TensorImages:
    if size is None or data.shape[1:] == (size, size):
        return data
    if size < 1:
        raise DataError(f"data {data.name!r}: the image size must be at least 1 pixel, not {size}")
    resize = torch.nn.functional.interpolate
    parts = [  # in parts: the whole set as floats would be four times its size
        resize(part, (size, size), mode="bilinear", antialias=True, align_corners=False)
        for part in torch.split(data.pixels, 4096)
    ]
    return TensorImages(torch.cat(parts), data.labels, data.classes, data.name)


NAMED: dict[str, Callable[[Source], ImageSet]] = {
    "digits": _digits,
    "mnist": _torchvision("mnist", "MNIST", _DIGITS, "MNIST/raw"),
    "fashion-mnist": _torchvision("fashion-mnist", "FashionMNIST", None, "FashionMNIST/raw"),
    "cifar10": _torchvision("cifar10", "CIFAR10", None, "cifar-10-batches-py"),
    "celeba": _celeba,
}
"""Data sets by name."""


def open_folder(folder: Path, *, split: Split, size: int | None, channels: int | None = None) -> FileImages:
    """Open a folder of images per class; class names are sorted, an empty folder is a class, too.

    Images in `folder` itself, without class folders, are one class. If `folder` contains `train` and `test` folders of
    class folders, the split selects one of them, and the classes are those of both; otherwise there is a train split
    only.

    Parameters
    ----------
    folder : Path
        The folder.
    split : {"train", "test"}
        Which split.
    size : int, optional
        Height and width in pixels; 32 by default.
    channels : int, optional
        1 (grey) or 3 (RGB); by default 1 if all inspected images are grey.

    Raises
    ------
    DataError
        The folder is missing or empty, contains no image, or has no such split.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"data folder {folder} {what}; give a folder with one folder of images per class")
    # The folder's own name, never its path: other machines see it.
    name = folder.resolve().name or "images"
    top, names = folder, _folders(folder)
    if has_test(folder):
        # A split may lack a class; a label must mean the same in both.
        names = sorted({one for part in ("train", "test") for one in _folders(folder / part)})
        folder = folder / split
    elif split == "test":
        raise DataError(
            f"data folder {folder} has no test images: put class folders in its train/ and test/, or hold a "
            f"share of its images out with {folder}:0/1:iid+holdout=0.2"
        )
    loose = _images(folder, deep=False)
    if loose and names:
        raise DataError(
            f"data folder {folder} contains images next to its class folders ({loose[0].name}, …); "
            "move each into the folder of its class"
        )
    classes = names or ["images"]
    found = [_images(folder / one, deep=True) for one in names] if names else [loose]
    files = [file for part in found for file in part]
    if not files:
        what = "is empty" if not any(folder.iterdir()) else "contains no image"
        raise DataError(
            f"data folder {folder} {what}; put images ({', '.join(sorted(SUFFIXES))}) in one folder per class"
        )
    labels = np.repeat(np.arange(len(classes)), [len(part) for part in found])
    return FileImages(
        files,
        labels,
        classes,
        name,
        channels=channels
        if channels is not None
        else _channels(files if folder == top else _images(top, deep=True)),
        size=size if size is not None else FOLDER_SIZE,
    )


def has_test(folder: Path) -> bool:
    """Return whether a folder of images has a test split: `train` and `test` folders of class folders."""
    return all((folder / part).is_dir() and _folders(folder / part) for part in ("train", "test"))


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")


def _images(folder: Path, *, deep: bool) -> list[Path]:
    entries = folder.rglob("*") if deep else folder.iterdir()
    return sorted(
        entry
        for entry in entries
        if entry.suffix.lower() in SUFFIXES and not entry.name.startswith(".") and entry.is_file()
    )


def _channels(files: list[Path]) -> int:
    """Return 1 if a sample of the files, evenly spaced over the list, is all grey by the headers; else 3."""
    from PIL import Image

    step = max(1, len(files) // _PEEK)
    for file in files[::step]:
        try:
            with Image.open(file) as image:
                if image.mode not in ("1", "L", "LA", "I", "I;16"):
                    return 3
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"image {file} cannot be read ({error}); remove it or replace it") from error
    return 1
