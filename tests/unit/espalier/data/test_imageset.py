"""Images in memory and on disk: values, shapes, memory cap and errors that name the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from espalier.data.imageset import FileImages, ImageSet, TensorImages, batches, decode, to_float, to_uint8
from espalier.data.sources import open_folder
from espalier.errors import DataError


def picture(file: Path, colour: int | tuple[int, int, int], size: tuple[int, int] = (12, 8)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(file)
    return file


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_pixels_map_to_plus_minus_one_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    values = to_float(pixels)
    assert values[0] == -1.0
    assert values[255] == 1.0
    assert torch.equal(to_uint8(values), pixels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_tensor_images_fetch_and_subset() -> None:
    pixels = torch.arange(3 * 4, dtype=torch.uint8).reshape(3, 1, 2, 2)
    data = TensorImages(pixels, ints(1, 0, 1), ("a", "b"), "toy")
    assert isinstance(data, ImageSet)
    assert (len(data), data.shape) == (3, (1, 2, 2))
    part = data.subset(ints(2, 0))
    assert part.labels.tolist() == [1, 1]
    assert part.classes == ("a", "b")
    assert torch.allclose(part.fetch(ints(0)), torch.tensor([8.0, 9, 10, 11]).reshape(1, 1, 2, 2) / 127.5 - 1)
    pixels[2] = 0  # a subset is a copy: it must not keep the whole set alive
    assert part.pixels[0].flatten().tolist() == [8, 9, 10, 11]
    assert [len(part) for part in batches(data, 2)] == [2, 1]


@pytest.mark.parametrize("bad", [ints(3), ints(-1), np.array([0.5]), np.array([[0]])])
def test_indices_are_checked(bad: np.ndarray) -> None:
    data = TensorImages(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), ints(0, 0, 0), ("a",), "toy")
    with pytest.raises(DataError, match="'toy'"):
        data.fetch(bad)


def test_labels_and_pixels_must_fit() -> None:
    pixels = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(DataError, match="outside 0 to 0"):
        TensorImages(pixels, ints(0, 1), ("a",), "toy")
    with pytest.raises(DataError, match="2 images"):
        TensorImages(pixels, ints(0), ("a",), "toy")
    with pytest.raises(DataError, match="uint8"):
        TensorImages(pixels.float(), ints(0, 0), ("a",), "toy")


def test_folder_of_class_folders(tmp_path: Path) -> None:
    picture(tmp_path / "photos" / "dog" / "1.png", (255, 0, 0))
    picture(tmp_path / "photos" / "cat" / "deep" / "2.JPG", (0, 0, 255))
    picture(tmp_path / "photos" / "cat" / "3.png", (0, 255, 0))
    (tmp_path / "photos" / "cow").mkdir()
    (tmp_path / "photos" / "cat" / "notes.txt").write_text("no image")
    data = open_folder(tmp_path / "photos", split="train", size=4)
    assert data.name == "photos"
    assert data.classes == ("cat", "cow", "dog")  # a class without an image here still has its label
    assert data.labels.tolist() == [0, 0, 2]
    assert data.shape == (3, 4, 4)
    assert torch.equal(data.fetch(ints(2))[0], torch.tensor([1.0, -1, -1]).reshape(3, 1, 1).expand(3, 4, 4))
    assert open_folder(tmp_path / "photos", split="train", size=None).shape == (3, 32, 32)
    assert data.subset(ints(2)).labels.tolist() == [2]


def test_grey_images_give_one_channel(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "1.png", 255)
    assert open_folder(tmp_path, split="train", size=4).shape == (1, 4, 4)
    colour = open_folder(tmp_path, split="train", size=4, channels=3)
    assert torch.equal(colour.fetch(ints(0)), torch.ones(1, 3, 4, 4))


def test_folder_without_classes_is_one_class(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", 0)
    data = open_folder(tmp_path, split="train", size=4)
    assert (data.classes, data.labels.tolist()) == (("images",), [0])


def test_train_and_test_folders_are_the_splits(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a" / "1.png", 0)
    picture(tmp_path / "test" / "a" / "2.png", 255)
    picture(tmp_path / "test" / "a" / "3.png", 255)
    assert len(open_folder(tmp_path, split="train", size=4)) == 1
    test = open_folder(tmp_path, split="test", size=4)
    assert len(test) == 2
    assert test.name == tmp_path.name
    assert torch.equal(test.fetch(ints(0)), torch.ones(1, 1, 4, 4))


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_folder(tmp_path / "none", split="train", size=4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is empty"):
        open_folder(tmp_path / "empty", split="train", size=4)
    (tmp_path / "text" / "a").mkdir(parents=True)
    (tmp_path / "text" / "a" / "x.txt").write_text("x")
    with pytest.raises(DataError, match="contains no image"):
        open_folder(tmp_path / "text", split="train", size=4)
    with pytest.raises(DataError, match="not a folder"):
        open_folder(tmp_path / "text" / "a" / "x.txt", split="train", size=4)
    picture(tmp_path / "mixed" / "a" / "1.png", 0)
    with pytest.raises(DataError, match="no test images"):
        open_folder(tmp_path / "mixed", split="test", size=4)
    picture(tmp_path / "mixed" / "stray.png", 0)
    with pytest.raises(DataError, match=r"stray\.png"):
        open_folder(tmp_path / "mixed", split="train", size=4)


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"broken\.png cannot be read"):
        open_folder(tmp_path, split="train", size=4)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    (tmp_path / "b").mkdir()
    Image.fromarray(noise).save(tmp_path / "b" / "1.jpg")
    whole = (tmp_path / "b" / "1.jpg").read_bytes()
    (tmp_path / "a" / "broken.png").unlink()
    (tmp_path / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    data = open_folder(tmp_path, split="train", size=4)  # its header is whole: found when fetched
    with pytest.raises(DataError, match=r"cut\.jpg cannot be read"):
        data.fetch(ints(0))


def test_decode_crops_the_centre_square(tmp_path: Path) -> None:
    # 6 wide, 2 high: columns 2 and 3 are the centre square.
    pixels = np.array([[0, 0, 10, 20, 0, 0], [0, 0, 30, 40, 0, 0]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert decode(tmp_path / "wide.png", channels=1, size=2).tolist() == [[[10, 20], [30, 40]]]


def test_decode_stands_a_photo_upright(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[10, 20], [30, 40]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: turned by 180 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    assert decode(tmp_path / "turned.png", channels=1, size=2).tolist() == [[[40, 30], [20, 10]]]


def test_cache_keeps_to_its_cap_and_is_shared(tmp_path: Path) -> None:
    files = [picture(tmp_path / f"{i}.png", i) for i in range(3)]
    data = FileImages(files, ints(0, 0, 0), ("a",), "x", channels=1, size=4, cache_bytes=40)  # 16 bytes each
    before = torch.cat([data.fetch(ints(i)) for i in range(3)])
    for file in files:
        file.unlink()
    assert torch.equal(data.subset(ints(1, 0)).fetch(ints(0, 1)), before[[1, 0]])
    with pytest.raises(DataError, match=r"2\.png"):  # the third did not fit
        data.fetch(ints(2))
