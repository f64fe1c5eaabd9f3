"""What a client's share gets beyond the partition: sizes, test images like its training ones, rotation, hold-out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from espalier.data.imageset import ImageSet
from espalier.data.partition import Scheme, assign
from espalier.data.shares import Extras, apportion, divide_test, hold_out, label_table, resize
from espalier.data.spec import open_data, open_test, parse_spec
from espalier.errors import DataError
from espalier_client.histogram import label_histogram


def labels_of(counts: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


def shares(labels: np.ndarray, classes: int) -> np.ndarray:
    counts: np.ndarray = label_histogram(labels, classes)
    share: np.ndarray = counts / counts.sum()
    return share


def open_splits(spec: str, size: int | None = None) -> tuple[ImageSet, ImageSet | None]:
    return open_data(spec, size=size), open_test(spec, size=size)


# --- grammar ---------------------------------------------------------------------------------------------


def test_options_follow_the_scheme() -> None:
    spec = parse_spec("digits:3/20:iid+rotate=4")
    assert (spec.scheme, spec.extras) == (Scheme("iid"), Extras(rotate=4))
    spec = parse_spec("digits:3/20:dirichlet=1e+2,seed=7+lognormal=0.5+rotate=2")
    assert (spec.scheme, spec.extras) == (Scheme("dirichlet", 100.0, seed=7), Extras(2, 0.5))
    assert parse_spec("./photos:0/1:iid+holdout=.2").extras == Extras(holdout=0.2)
    assert parse_spec("digits:3/20:iid+shots=5+scarce=3").extras == Extras(shots=5, scarce=3)
    assert parse_spec("digits:3/20").extras == Extras()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("digits:0/2:iid+rotate=3", "give 2 or 4"),
        ("digits:0/2:iid+rotate", "give .rotate=2 or .rotate=4, .lognormal=SIGMA, .holdout=SHARE"),
        ("digits:0/2:iid+turn=4", "not understood; give .rotate"),
        ("digits:0/2:iid+rotate=4+rotate=4", "twice"),
        ("digits:0/2:iid+lognormal=0", "above 0"),
        ("digits:0/2:iid+lognormal=-1", "not understood"),
        ("digits:0/2:iid+lognormal=inf", "not understood"),
        ("./photos:0/2:iid+holdout=1", "between 0 and 1"),
        ("digits:0/2:iid+holdout=0.2", "leave .holdout out"),
        ("digits:0/2:iid+shots=0", "whole number of images"),
        ("digits:0/2:iid+shots=2.5", "whole number of images"),
        ("digits:0/2:iid+scarce=0", "whole number of labels"),
        ("digits:0/2:similarity", "not understood"),
        ("digits:0/2:similarity=101", "give 0 to 100"),
    ],
)
def test_bad_options_say_what_is_wrong(text: str, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        parse_spec(text)


# --- few images, scarce labels ---------------------------------------------------------------------------


def test_few_shots_and_scarce_labels_leave_the_test_images_alone() -> None:
    whole, test = open_splits("digits:1/4:iid,seed=2")
    counts = label_histogram(whole.labels, 10)
    few, few_test = open_splits("digits:1/4:iid,seed=2+shots=7")
    assert label_histogram(few.labels, 10).tolist() == np.minimum(counts, 7).tolist() == [7] * 10
    scarce, scarce_test = open_splits("digits:1/4:iid,seed=2+scarce=3")
    left = label_histogram(scarce.labels, 10)
    cut = left != counts
    assert (cut.sum(), set(left[cut])) == (3, {5})
    assert [len(images) for images in (test, few_test, scarce_test) if images] == [90, 90, 90]
    # The kept images are the share's own, each once, the same at every start.
    for kept in (few, scarce):
        images = {image.numpy().tobytes() for image in whole.fetch(np.arange(len(whole)))}
        mine = [image.numpy().tobytes() for image in kept.fetch(np.arange(len(kept)))]
        assert set(mine) <= images
    again = open_data("digits:1/4:iid,seed=2+scarce=3")
    assert torch.equal(again.fetch(np.arange(len(again))), scarce.fetch(np.arange(len(scarce))))


def test_other_clients_and_seeds_lack_other_labels() -> None:
    def lacking(spec: str) -> tuple[int, ...]:
        counts = label_histogram(open_data(spec).labels, 10)
        return tuple(np.flatnonzero(counts <= 5))

    found = {lacking(f"digits:{i}/4:iid,seed={s}+scarce=3") for i in range(4) for s in range(2)}
    assert len(found) > 5


def test_more_scarce_labels_than_classes_are_refused() -> None:
    with pytest.raises(DataError, match="there are 10 classes"):
        open_data("digits:0/4:iid+scarce=11")


# --- SCAFFOLD's similarity -------------------------------------------------------------------------------


def test_similarity_by_hand() -> None:
    # 10 classes of 20, 5 clients. 0 %: sorted, two whole classes each. 25 %: 50 samples dealt IID, ten each,
    # the other 150 sorted, 30 each.
    labels = np.random.default_rng(0).permutation(labels_of([20] * 10))
    table = label_table(assign(labels, 5, Scheme("similarity", 0), name="toy"), labels, 5)
    for client in range(5):
        assert table[client].tolist() == [20 * (c // 2 == client) for c in range(10)]
    owner = assign(labels, 5, Scheme("similarity", 25), name="toy")
    table = label_table(owner, labels, 5)
    assert table.sum(axis=1).tolist() == [40] * 5
    for client in range(5):
        # A sorted block of 30 lies within at most four neighbouring classes; the ten others are anywhere.
        block = sorted(table[client], reverse=True)[:4]
        assert sum(block) >= 30
        assert np.count_nonzero(table[client]) > 2


def test_similarity_of_all_is_iid() -> None:
    labels = labels_of([300] * 4)
    table = label_table(assign(labels, 3, Scheme("similarity", 100), name="toy"), labels, 3)
    assert table.sum(axis=1).tolist() == [400] * 3
    assert np.abs(table - 100).max() < 30  # more than three standard deviations (8.2 each)
    assert str(Scheme.parse("similarity=0")) == "similarity=0"
    assert Scheme.parse(str(Scheme("similarity", 12.5))) == Scheme("similarity", 12.5)


def test_similarity_gives_equal_sizes() -> None:
    labels = labels_of([7, 9, 8])
    sizes = np.bincount(assign(labels, 5, Scheme("similarity", 30), name="toy"))
    assert sizes.max() - sizes.min() <= 1


# --- rounding --------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    weights=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=8),
    totals=st.lists(st.integers(0, 30), min_size=3, max_size=3),
)
def test_rounding_keeps_columns_and_stays_near(weights: list[list[int]], totals: list[int]) -> None:
    table = np.array(weights, float)
    held = table.sum(axis=0)
    wanted = np.array(totals) * (held > 0)
    quotas = table * np.divide(wanted, held, out=np.zeros(3), where=held > 0)
    counts = apportion(quotas, wanted, np.random.default_rng(1))
    assert counts.min() >= 0
    assert counts.sum(axis=0).tolist() == wanted.tolist()
    assert not counts[quotas == 0].any()  # nobody gets a class they have none of
    if (quotas.sum(axis=1) >= 3).all():  # nobody came out empty, so nothing was handed on
        assert np.abs(counts - quotas).max() < 1 + 1e-6


def test_an_empty_row_is_given_one() -> None:
    # 4 test images, quotas 3.4, 0.3, 0.3: rounding leaves the small ones none or one of them none.
    counts = apportion(np.array([[3.4], [0.3], [0.3]]), np.array([4]), np.random.default_rng(0))
    assert counts.ravel().tolist() == [2, 1, 1]


# --- test split ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["dirichlet=0.3", "pathological=2", "similarity=10", "fedphd"])
def test_test_shares_look_like_training_shares(scheme: str) -> None:
    pairs = [open_splits(f"digits:{i}/10:{scheme}") for i in range(10)]
    whole = open_data("digits", split="test")
    total = np.zeros(10)
    for train, test in pairs:
        assert test is not None
        train_counts, test_counts = (label_histogram(d.labels, 10) for d in (train, test))
        # digits are split 4 : 1 in every class, so a test share is a quarter of its training share.
        assert np.abs(test_counts - train_counts / 4).max() < 1.2
        assert not test_counts[train_counts == 0].any()
        total += test_counts
    assert np.array_equal(total, label_histogram(whole.labels, 10))
    again = open_data(f"digits:3/10:{scheme}", split="test")
    mine = pairs[3][1]
    assert mine is not None
    assert torch.equal(again.fetch(np.arange(len(again))), mine.fetch(np.arange(len(mine))))
    seen = torch.cat([t.fetch(np.arange(len(t))) for _, t in pairs if t is not None])
    everything = whole.fetch(np.arange(len(whole)))
    assert sorted(map(bytes, seen.flatten(1).numpy())) == sorted(map(bytes, everything.flatten(1).numpy()))


def test_a_test_split_is_divided_class_by_class() -> None:
    # Class 0 held 30:10 by two clients, class 1 by the second only, class 2 by nobody.
    labels = np.array([0] * 40 + [1] * 10)
    owner = np.array([0] * 30 + [1] * 20)
    test = labels_of([8, 3, 2])
    got = label_table(divide_test(owner, labels, test, 2, seed=0, name="toy"), test, 2)
    assert got.tolist() == [[6, 0, 0], [2, 3, 0]]


def test_even_partitions_divide_the_test_split_evenly() -> None:
    sizes = [len(open_data(f"digits:{i}/7", split="test")) for i in range(7)]
    assert sum(sizes) == 360
    assert max(sizes) - min(sizes) <= 1


def test_a_test_split_too_small_for_all() -> None:
    train, test = open_splits("digits:0/400")
    assert len(train) == 4  # 1437 over 400
    assert test is None
    with pytest.raises(DataError, match="use fewer partitions"):
        open_data("digits:0/400", split="test")


# --- unequal sizes ---------------------------------------------------------------------------------------


def test_sizes_follow_the_log_normal_law() -> None:
    labels = np.random.default_rng(0).permutation(labels_of([400] * 10))
    even = assign(labels, 200, Scheme("iid"), name="toy")
    sizes = np.bincount(resize(even, labels, 200, 1.0, seed=0, name="toy"), minlength=200)
    assert sizes.sum() == len(labels)
    spread = np.log(sizes).std()
    assert 0.8 < spread < 1.2  # 200 draws: the standard error of sigma is 0.05, and sizes are rounded
    assert not np.array_equal(
        sizes, np.bincount(resize(even, labels, 200, 1.0, seed=1, name="toy"), minlength=200)
    )


def test_unequal_sizes_keep_the_label_skew() -> None:
    labels = labels_of([100] * 6)
    owner = assign(labels, 6, Scheme("pathological", 2), name="toy")
    skewed = resize(owner, labels, 6, 0.7, seed=3, name="toy")
    before, after = (label_table(o, labels, 6) for o in (owner, skewed))
    assert not after[before == 0].any()
    assert after.sum(axis=0).tolist() == [100] * 6
    assert np.array_equal(skewed, resize(owner, labels, 6, 0.7, seed=3, name="toy"))
    assert after.sum(axis=1).std() > before.sum(axis=1).std()


def test_two_clients_share_every_class_at_the_same_odds() -> None:
    labels = labels_of([3000, 1000])
    owner = np.concatenate([np.repeat([0, 1], [1500, 1500]), np.repeat([0, 1], [800, 200])])
    after = label_table(resize(owner, labels, 2, 1.0, seed=0, name="toy"), labels, 2)
    odds = (after[0, 0] / after[1, 0], after[0, 1] / after[1, 1])  # before: 1 and 4
    assert odds[1] / odds[0] == pytest.approx(4, rel=0.05)
    assert odds[0] != pytest.approx(1, rel=0.05)


def test_sizes_of_a_spec() -> None:
    pairs = [open_splits(f"digits:{i}/8:iid+lognormal=1") for i in range(8)]
    sizes = [len(train) for train, _ in pairs]
    assert sum(sizes) == 1437
    assert max(sizes) > 3 * min(sizes)
    for train, test in pairs:
        assert test is not None
        assert abs(len(test) - len(train) / 4) < 3
        assert np.abs(shares(train.labels, 10) - 0.1).max() < 0.12
    # Rotation leaves everything else as it is.
    turned = open_data("digits:2/8:iid+lognormal=1+rotate=2")
    assert turned.labels.tolist() == pairs[2][0].labels.tolist()


def test_sizes_that_leave_a_client_too_few_are_refused() -> None:
    labels = labels_of([10, 10])
    owner = assign(labels, 10, Scheme("iid"), name="toy")
    with pytest.raises(DataError, match="smaller sigma"):
        resize(owner, labels, 10, 3.0, seed=0, name="toy", min_size=2)


# --- rotation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("steps", "client", "quarters"), [(4, 3, 3), (4, 5, 1), (4, 4, 0), (2, 3, 2)])
def test_rotation_is_numpys(split: str, steps: int, client: int, quarters: int) -> None:
    plain = open_data(f"digits:{client}/6:iid", split=split)  # type: ignore[arg-type]
    turned = open_data(f"digits:{client}/6:iid+rotate={steps}", split=split)  # type: ignore[arg-type]
    some = np.array([4, 0, 7])
    expected = np.rot90(plain.fetch(some).numpy(), quarters, axes=(2, 3))
    assert np.array_equal(turned.fetch(some).numpy(), expected)
    assert np.array_equal(turned.subset(some).fetch(np.arange(3)).numpy(), expected)
    assert turned.labels.tolist() == plain.labels.tolist()
    assert (turned.shape, turned.name, turned.classes) == (plain.shape, plain.name, plain.classes)


# --- folders ---------------------------------------------------------------------------------------------


def fill(folder: Path, classes: dict[str, int]) -> Path:
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (4, 4), (i * 7) % 256).save(folder / name / f"{i:03d}.png")
    return folder


def test_a_folder_without_test_images_has_none(tmp_path: Path) -> None:
    folder = fill(tmp_path / "photos", {"a": 10, "b": 5})
    train, test = open_splits(str(folder))
    assert (len(train), test) == (15, None)
    with pytest.raises(DataError, match=r"holdout=0\.2"):
        open_data(str(folder), split="test")


def test_images_are_held_out_class_by_class(tmp_path: Path) -> None:
    folder = fill(tmp_path / "photos", {"a": 20, "b": 10})
    spec = f"{folder}:0/1:iid+holdout=0.2"
    train, test = open_splits(spec, size=4)
    assert test is not None
    assert label_histogram(train.labels, 2).tolist() == [16, 8]
    assert label_histogram(test.labels, 2).tolist() == [4, 2]
    assert not {*train.files} & {*test.files}  # type: ignore[attr-defined]
    assert open_data(spec, split="test").files == test.files  # type: ignore[attr-defined]
    # Of a share, it is the share's own images that are held out.
    halves = [open_splits(f"{folder}:{i}/2:iid+holdout=0.2") for i in range(2)]
    files = [f for train, test in halves for d in (train, test) for f in d.files]  # type: ignore[union-attr]
    assert len(files) == len(set(files)) == 30
    assert [len(test) for _, test in halves if test is not None] == [3, 3]


def test_a_folder_with_test_images(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    fill(folder / "train", {"a": 6, "b": 6, "c": 6})
    fill(folder / "test", {"a": 2, "c": 4})
    train, test = open_splits(str(folder))
    assert test is not None
    assert train.classes == test.classes == ("a", "b", "c")
    assert label_histogram(test.labels, 3).tolist() == [2, 0, 4]
    with pytest.raises(DataError, match=r"leave \+holdout out"):
        open_test(f"{folder}:0/1:iid+holdout=0.2")
    # Channels are those of both splits.
    Image.new("RGB", (4, 4), (9, 0, 0)).save(folder / "test" / "a" / "red.png")
    assert open_data(str(folder)).shape[0] == open_data(str(folder), split="test").shape[0] == 3


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 5),
)
def test_hold_out_is_a_stratified_split(counts: list[int], share: float, seed: int) -> None:
    labels = labels_of(counts)
    try:
        train, test = hold_out(labels, share, seed=seed, name="toy")
    except DataError:
        assert not 0 < np.floor(round(share * len(labels), 9)) < len(labels)
        return
    assert sorted([*train, *test]) == list(range(len(labels)))
    got = label_histogram(labels[test], len(counts))
    assert np.abs(got - share * np.array(counts)).max() <= 1 + 1e-6
