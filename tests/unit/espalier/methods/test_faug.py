"""FAug: what is scarce, what is uploaded, what leaks, and clients that are filled up before any method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.local_tree import LocalClient, LocalTree

from espalier.data.spec import open_data
from espalier.generators.conditional import ConditionalGenerator
from espalier.methods.faug import SEED_IMAGES, SEED_LABELS, SEEDS, leakage, seed_labels, seeds_layout, targets
from espalier.methods.run_config import RunConfig
from espalier.wire.class_table import TABLE
from espalier.wire.pairs import to_pixels
from espalier.wire.sections import Payload
from espalier_client.device import Device
from espalier_server.generators.conditional_training import train_conditional
from espalier_server.records.record import AugmentationEntry
from tests.support.by_hand import run_tree

#: Two and a half classes each: some labels are scarce, some are not there at all.
DATA = "digits:{i}/16:dirichlet=0.3,seed=3"


def test_targets_by_hand() -> None:
    # Mean 6, so below 3 is scarce; the others' mean is (10 + 4 + 12 + 10) / 4 = 9.
    counts = np.array([10, 2, 4, 12, 0, 10, 4, 6])
    counts[6] = 0
    # Now the mean is 5.5, below 2.75 is scarce: labels 1, 4, 6; the others' mean is 42 / 5 = 8.4.
    np.testing.assert_array_equal(targets(counts, 0.5), [0, 6, 0, 0, 8, 0, 8, 0])
    # A label just at the share of the mean is none: 2.5 of mean 5.
    np.testing.assert_array_equal(targets(np.array([7.5, 2.5]), 0.5), [0, 0])
    np.testing.assert_array_equal(targets(np.full(4, 9), 0.5), np.zeros(4))
    # The paper's set-up: seven labels of 200, three cut to five.
    cut = np.array([200] * 7 + [5] * 3)
    np.testing.assert_array_equal(targets(cut, 0.5), [0] * 7 + [195] * 3)
    assert len(set(cut + targets(cut, 0.5))) == 1


def test_seeds_are_of_the_scarce_labels_and_some_that_hide_them() -> None:
    counts = np.array([20, 1, 30, 0, 25, 20])
    rng = np.random.default_rng(0)
    assert seed_labels(counts, RunConfig(), rng) == ([1], [])  # nothing of label 3 is there to upload
    wanted, redundant = seed_labels(counts, RunConfig(faug_redundant=3), rng)
    assert wanted == [1]
    assert len(set(redundant)) == 3
    assert set(redundant) <= {0, 2, 4, 5}
    assert seed_labels(counts, RunConfig(faug_redundant=9), rng)[1] == [0, 2, 4, 5]
    assert seed_labels(np.full(6, 20), RunConfig(faug_redundant=2), rng)[0] == []


@pytest.mark.parametrize(
    ("wanted", "redundant", "uploaded", "to_server", "between"),
    [
        (3, 0, 3, 1.0, 1.0),  # nothing hides the targets, nobody else uploads
        (3, 3, 10, 0.5, 0.3),
        (1, 4, 8, 0.2, 0.125),
        (0, 2, 5, 0.0, 0.0),
        (0, 0, 0, 0.0, 0.0),
    ],
)
def test_leakage_by_hand(
    wanted: int, redundant: int, uploaded: int, to_server: float, between: float
) -> None:
    assert leakage(wanted, redundant, uploaded) == pytest.approx((to_server, between))


@pytest.mark.parametrize("count", [-1, 2.5, 1e6])
def test_an_absurd_number_of_seeds(count: float) -> None:
    with pytest.raises(ValueError, match="seed images"):
        seeds_layout({"seeds": count}, (1, 8, 8))


def test_the_generator_has_the_papers_size() -> None:
    model = ConditionalGenerator(10, (1, 28, 28))
    assert sum(p.numel() for p in model.parameters()) == 1_493_520
    assert len(model.layers) == 4


def test_the_generator_depends_on_its_seed() -> None:
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (6, 1, 8, 8), dtype=np.uint8), np.array([0, 0, 1, 1, 1, 4])
    model, same, other = (train_conditional(pixels, labels, 5, steps=2, seed=s) for s in (1, 1, 2))
    wanted = np.array([0, 4, 1])
    drawn = model.draw(wanted, 5)
    assert drawn.shape == (3, 1, 8, 8)
    assert drawn.abs().max() <= 1
    received = ConditionalGenerator.of(model.arrays(), 5, (1, 8, 8))
    for equal in (same, received):
        torch.testing.assert_close(equal.draw(wanted, 5), drawn, rtol=0, atol=0)
    assert not torch.allclose(other.draw(wanted, 5), drawn)
    assert not torch.allclose(model.draw(wanted, 6), drawn)
    # The class is heard: the same noise under another label is another image.
    assert not torch.allclose(model.draw(np.array([1, 1, 1]), 5)[0], drawn[0])
    with pytest.raises(ValueError, match="no generator of these images"):
        ConditionalGenerator.of(model.arrays(), 5, (1, 9, 9))


def test_fifteen_seeds_a_label_make_images_of_that_label() -> None:
    """Another classifier knows them, and a label's images are not one and the same."""
    from sklearn.linear_model import LogisticRegression

    data = open_data("digits")
    pixels, labels = to_pixels(data.fetch(np.arange(len(data))).numpy()), np.asarray(data.labels)
    seeds = np.concatenate([np.flatnonzero(labels == label)[:15] for label in range(10)])
    model = train_conditional(pixels[seeds], labels[seeds], 10, steps=80, seed=1)
    wanted = np.repeat(np.arange(10), 20)
    drawn = model.draw(wanted, 2).flatten(1)
    others = np.delete(np.arange(len(labels)), seeds)
    judge = LogisticRegression(max_iter=300).fit(
        pixels[others].reshape(len(others), -1) / 127.5 - 1, labels[others]
    )
    assert judge.score(drawn.numpy(), wanted) > 0.85
    spread = drawn.view(10, 20, -1).std(1).mean()
    real = np.stack([pixels[labels == label].std(0).mean() for label in range(10)]).mean() / 127.5
    assert spread > 0.4 * real


def faug_tree(folder: Path) -> LocalTree:
    return LocalTree(folder, [LocalClient(f"c{i}", DATA.format(i=i), (0, 1)) for i in range(4)], 2)


SETTINGS: dict[str, Any] = {"augment": "faug", "faug_steps": 3, "faug_redundant": 1, "batch_size": 256}


@pytest.mark.parametrize("name", ["fd", "fedavg"])
def test_clients_are_filled_up_before_the_first_round(name: str, tmp_path: Path) -> None:
    tree = faug_tree(tmp_path)
    run = run_tree(tree, name, 4, **SETTINGS, rounds=2, model="logistic")
    record = run.recorder.record
    assert record.faults == []
    entry = record.augmentation
    assert entry is not None
    wants = {}
    for client in tree.clients.values():
        own = np.bincount(open_data(client.data).labels, minlength=10)
        wants[client.name] = {int(c) for c in np.flatnonzero((own < own.mean() / 2) & (own > 0))}
        # Read anew from its folder, as after a restart; another run has the device's own images.
        device = Device(client.name, client.data, state=tmp_path / "clients" / client.name)
        filled = np.bincount(device.images_for("r").labels, minlength=10)
        assert device.images_for("another") is device.images
        scarce = own < own.mean() / 2
        level = round(own[~scarce].mean())
        assert set(filled[scarce]) == {level}
        np.testing.assert_array_equal(filled[~scarce], own[~scarce])
        assert entry.filled[client.name] == (filled - own).sum() > 0
        assert entry.leakage_to_server[client.name] == pytest.approx(
            len(wants[client.name]) / (len(wants[client.name]) + 1)
        )
        assert len(wants[client.name]) < entry.seeds[client.name] <= 5 * (len(wants[client.name]) + 1)
        images = device.images_for("r").fetch(np.arange(len(device.images), filled.sum()))
        assert images.shape == (entry.filled[client.name], 1, 8, 8)
        assert images.abs().max() <= 1
    # Everybody's share is of the same labels: those that anybody uploaded.
    ratios = {len(wants[n]) / v for n, v in entry.leakage_between.items() if v}
    assert len(ratios) == 1
    assert max(len(w) for w in wants.values()) <= ratios.pop() <= 10
    own_size = ConditionalGenerator(10, (1, 8, 8))
    assert entry.parameters == sum(p.numel() for p in own_size.parameters())
    # Four devices are given it, in single precision.
    assert entry.links["client-edge"].down_bytes > 4 * 4 * entry.parameters
    assert (run.out / "samples" / "augmentation.png").exists()


def test_training_takes_what_was_filled_in(tmp_path: Path) -> None:
    """FD's tables afterwards have a row for every class: none is missing any more."""
    tree = faug_tree(tmp_path)
    run = run_tree(tree, "fd", 4, **SETTINGS, rounds=1, model="logistic")
    assert run.state is not None
    np.testing.assert_array_equal(run.state.section(TABLE)["count"], np.full(10, 4))


def test_a_run_that_goes_on_does_not_fill_twice(tmp_path: Path) -> None:
    tree = faug_tree(tmp_path)
    first = run_tree(tree, "fedavg", 4, **SETTINGS, rounds=1, model="logistic").recorder.record
    again = run_tree(tree, "fedavg", 4, **SETTINGS, rounds=2, model="logistic").recorder.record
    assert again.augmentation == first.augmentation
    assert isinstance(again.augmentation, AugmentationEntry)
    assert [w.window for w in again.windows] == [1, 2]


@pytest.mark.parametrize("label", [10, -1])
def test_seeds_with_bad_labels_are_refused_by_name(
    label: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from espalier_client import augmentation

    honest = augmentation._seeds

    def seeds(device: Device, settings: RunConfig, report: Any) -> Payload:
        arrays = {n: a.copy() for n, a in honest(device, settings, report)[SEEDS].views().items()}
        if device.name == "c1":
            arrays[SEED_LABELS][0] = label
        assert arrays[SEED_IMAGES].dtype == np.uint8
        return Payload.pack({SEEDS: arrays})

    monkeypatch.setattr(augmentation, "_seeds", seeds)
    run = run_tree(faug_tree(tmp_path), "fedavg", 4, **SETTINGS, rounds=1, model="logistic")
    [found] = run.recorder.record.faults
    assert (found.node, found.kind) == ("c1", "refused")
    assert f"a seed image of label {label}, but there are 10 classes" in found.detail
    entry = run.recorder.record.augmentation
    assert entry is not None
    assert set(entry.seeds) == {"c0", "c2", "c3"}
    assert set(entry.filled) == {"c0", "c1", "c2", "c3"}


def test_a_generator_of_other_images_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ConditionalGenerator(10, (1, 4, 4)).arrays()
    monkeypatch.setattr(ConditionalGenerator, "arrays", lambda self: other)
    run = run_tree(faug_tree(tmp_path), "fedavg", 4, **SETTINGS, rounds=1, model="logistic")
    faults = run.recorder.record.faults
    assert {f.node for f in faults} == {"c0", "c1", "c2", "c3"}
    assert all("no generator of these images" in f.detail for f in faults)
    assert run.recorder.record.windows[0].participants == ["c0", "c1", "c2", "c3"]
