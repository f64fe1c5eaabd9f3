"""The data SPEC, and the named data sets: grammar, disjoint covers."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from espalier.data.imageset import ImageSet
from espalier.data.partition import Scheme
from espalier.data.sources import NAMED, Source
from espalier.data.spec import open_data, parse_spec, sharing_sources
from espalier.errors import DataError
from espalier_client.histogram import label_histogram
from tests.support.paths import ROOT

SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ESPALIER_DOWNLOAD", "ESPALIER_DATA"):
        monkeypatch.delenv(name, raising=False)
    return


def test_grammar() -> None:
    assert parse_spec("digits").clients == 1
    spec = parse_spec("mnist:2/8:dirichlet=0.3,seed=7")
    assert (spec.source, spec.index, spec.clients) == ("mnist", 2, 8)
    assert spec.scheme == Scheme("dirichlet", 0.3, seed=7)
    assert parse_spec("cifar10:0/20:fedphd").scheme == Scheme("fedphd")
    assert parse_spec("digits:0/4:pathological=2").scheme == Scheme("pathological", 2)
    assert parse_spec("digits:0/4").scheme == Scheme("iid")
    assert parse_spec("./photos").is_folder
    folder = parse_spec("/data/x:1/3")
    assert (folder.source, folder.index, folder.clients, folder.is_folder) == ("/data/x", 1, 3, True)
    assert parse_spec("C:/photos").source == "C:/photos"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("digits:8/8", "partitions of 8 are numbered 0 to 7"),
        ("digits:0/0", "at least 1"),
        ("digits:x", "not understood"),
        ("digits:1/2:", "not understood"),
        ("digits:-1/2", "not understood"),
        ("./photos:1/2:iid:iid", "not understood"),
        ("", "not understood"),
        ("didgits", "give one of digits, mnist, fashion-mnist, cifar10, celeba"),
        ("digits:0/2:dirichlet", "scheme 'dirichlet' is not understood"),
        ("digits:0/2:dirichlet=nan", "not understood"),
        ("digits:0/2:dirichlet=0", "above 0"),
        ("digits:0/2:pathological=0", "at least 1 class"),
        ("digits:0/2:pathological=1.5", "not understood"),
        ("digits:0/2:iid=3", "not understood"),
        ("digits:0/2:iid,seed=1,seed=2", "not understood"),
        ("digits:0/2:iid,min=3", "not understood"),
        ("digits:0/2:shards", "iid, dirichlet=ALPHA, pathological=CLASSES, fedphd"),
    ],
)
def test_bad_specs_say_what_is_wrong(text: str, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        parse_spec(text)


def test_a_folder_named_without_a_path_is_pointed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"\./photos"):
        parse_spec("photos")


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    train, test = open_data("digits"), open_data("digits", split="test")
    assert (len(train), len(test), train.shape) == (1437, 360, (1, 8, 8))
    assert train.classes == tuple("0123456789")
    theirs = load_digits()
    rows = np.concatenate([theirs.images.reshape(-1, 64), theirs.target[:, None]], axis=1)
    ours = np.concatenate(
        [
            np.concatenate(
                [((s.fetch(np.arange(len(s))) + 1) * 8).reshape(-1, 64).numpy(), s.labels[:, None]], 1
            )
            for s in (train, test)
        ]
    )
    assert np.array_equal(np.unique(np.rint(ours), axis=0), np.unique(rows, axis=0))
    assert np.abs(ours - np.rint(ours)).max() < 0.04  # 16 grey levels in 8 bits
    # Each class is split alike: a fifth to within one image.
    held = label_histogram(test.labels, 10)
    whole = held + label_histogram(train.labels, 10)
    assert np.abs(held - whole / 5).max() <= 1


def test_digits_need_no_heavy_import() -> None:
    code = (
        "import sys; from espalier.data.spec import open_data; assert len(open_data('digits:1/4:dirichlet=0.5')); "
        "print([m for m in ('sklearn', 'datasets', 'flwr_datasets', 'pandas') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_size_is_a_choice() -> None:
    assert open_data("digits", size=16).shape == (1, 16, 16)
    with pytest.raises(DataError, match="at least 1 pixel"):
        open_data("digits", size=0)


def test_shares_of_digits_cover_them_disjointly() -> None:
    whole = open_data("digits")
    shares = [open_data(f"digits:{i}/5:fedphd") for i in range(5)]
    assert sum(len(share) for share in shares) == len(whole)
    counts = sum(label_histogram(share.labels, 10) for share in shares)
    assert np.array_equal(counts, label_histogram(whole.labels, 10))
    stacked = torch.cat([share.fetch(np.arange(len(share))) for share in shares]).flatten(1).numpy()
    everything = whole.fetch(np.arange(len(whole))).flatten(1).numpy()
    assert np.array_equal(np.unique(stacked, axis=0), np.unique(everything, axis=0))


def test_missing_data_sets_say_where_and_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(NAMED) == ("digits", "mnist", "fashion-mnist", "cifar10", "celeba")
    for name in tuple(NAMED)[1:]:
        with pytest.raises(DataError) as caught:
            open_data(name, root=tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert "ESPALIER_DOWNLOAD=1" in str(caught.value)
    monkeypatch.setenv("ESPALIER_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match="elsewhere"):
        open_data("mnist")


def test_celeba_classes_are_male_times_young(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from espalier.torchvision_shim import import_torchvision

    base = tmp_path / "celeba"
    (base / "img_align_celeba").mkdir(parents=True)
    names = [f"{i}.jpg" for i in range(6)]
    for i, name in enumerate(names):
        Image.new("RGB", (178, 218), (50 * i, 0, 0)).save(base / "img_align_celeba" / name)
    attributes = [(-1, -1), (-1, 1), (1, -1), (1, 1), (1, 1), (-1, 1)]  # Male, Young
    (base / "list_eval_partition.txt").write_text(
        "".join(f"{n} {int(i >= 4) * 2}\n" for i, n in enumerate(names))
    )
    (base / "identity_CelebA.txt").write_text("".join(f"{n} 1\n" for n in names))
    for file in ("list_bbox_celeba.txt", "list_landmarks_align_celeba.txt"):
        (base / file).write_text("5\na b\n" + "".join(f"{n} 0 0\n" for n in names))
    rows = "".join(f"{n} {m} {y}\n" for n, (m, y) in zip(names, attributes, strict=True))
    (base / "list_attr_celeba.txt").write_text(f"5\nMale Young\n{rows}")
    monkeypatch.setattr(import_torchvision().datasets.CelebA, "_check_integrity", lambda self: True)
    data = open_data("celeba", root=tmp_path)
    assert data.labels.tolist() == [0, 1, 2, 3]
    assert data.classes == ("female, older", "female, young", "male, older", "male, young")
    assert data.shape == (3, 64, 64)
    assert data.fetch(np.arange(4)).shape == (4, 3, 64, 64)
    assert open_data("celeba", root=tmp_path, split="test").labels.tolist() == [3, 1]
    assert open_data("celeba:2/4:fedphd", root=tmp_path).labels.tolist() == [2]


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"run: pip install 'espalier-fl\[testbed\]'"):
        open_data("digits")


@pytest.mark.data
@pytest.mark.skipif(not SHARED.is_dir(), reason="the data files are not beside the checkout")
@pytest.mark.parametrize(("name", "first"), [("mnist", "0"), ("fashion-mnist", "T-shirt/top")])
def test_torchvision_data_open_from_a_folder(name: str, first: str) -> None:
    data = open_data(f"{name}:3/50:iid", root=SHARED, split="test")
    assert (len(data), data.shape, data.classes[0]) == (200, (1, 28, 28), first)
    images = data.fetch(np.arange(10))
    assert images.min() == -1.0
    assert images.max() > 0.9


def test_a_shared_source_is_read_once_and_let_go_again(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    read = NAMED["digits"]

    def counted(source: Source) -> ImageSet:
        reads.append(source.split)
        return read(source)

    monkeypatch.setitem(NAMED, "digits", counted)
    alone = open_data("digits:1/4")
    with sharing_sources():
        for index in range(4):
            shared = open_data(f"digits:{index}/4")
            assert shared.shape == alone.shape
        np.testing.assert_array_equal(open_data("digits:1/4").labels, alone.labels)
        open_data("digits", split="test")
    assert reads == ["train", "train", "test"]
    open_data("digits:1/4")
    assert reads == ["train", "train", "test", "train"]
