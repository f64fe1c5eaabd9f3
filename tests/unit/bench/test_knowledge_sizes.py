"""Bytes of knowledge exchange: what crosses the links is what the formulas say, and the papers' totals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bench import knowledge_sizes as sizes
from bench.local_tree import LocalClient, LocalTree
from PIL import Image

from espalier.methods.aggregate import ROWS_SECTION, WEIGHTS
from espalier.wire.class_table import COUNT, MEAN, REPLY, ROUND, TABLE, VECTORS
from espalier.wire.pairs import CENTROIDS, IMAGES
from tests.support.by_hand import run_tree, small_tree, tapped
from tests.support.exchanges import edges_tell, training
from tests.support.generators import random_gan

ROUNDS = 16


def test_the_papers_payloads() -> None:
    """Jeong et al. 2018, table 1: MNIST, 16 rounds, 15 seeds (3 labels of 5), 1,493,520 parameters of G."""
    fl, fd = sizes.weights_bits(1_199_648, ROUNDS), sizes.soft_labels_bits(10, ROUNDS)
    faug = sizes.augmentation_bits(15, 28 * 28, 1_493_520)
    assert fl == 1_228_439_552
    assert fd == 102_400
    assert fd + faug == 47_989_120
    assert fl + faug == 1_276_326_272


@pytest.mark.parametrize(("name", "model", "dimension"), [("fd", "logistic", 10), ("fedproto", "cnn", 64)])
def test_a_table_up_and_down(name: str, model: str, dimension: int, tmp_path: Path) -> None:
    tree = small_tree(tmp_path, 2, 60, 1)
    calls = tapped(tree)
    run_tree(tree, name, 2, families=model, rounds=2)
    whole = sizes.table_bytes(10, dimension)
    assert whole == 4 * 10 * dimension
    for call in training(calls, 2).values():
        assert {s: set(arrays) for s, arrays in call.sections.items()} == {REPLY: {VECTORS}}
        assert call.sections[REPLY][VECTORS].nbytes == len(call.report.table.labels) * 4 * dimension <= whole
        [table] = call.sent_sections.values()
        assert set(table) == {MEAN, COUNT, ROUND}
        assert table[MEAN].nbytes == whole
        assert table[COUNT].nbytes + table[ROUND].nbytes == 10 * 8 + 8


@pytest.mark.parametrize(("name", "model", "dimension"), [("fd", "logistic", 10), ("fedproto", "cnn", 64)])
def test_the_upper_link_carries_one_table_an_edge(
    name: str, model: str, dimension: int, tmp_path: Path
) -> None:
    """However many clients an edge has: vectors, and a weight for each class."""
    for clients in (1, 4):
        tree = small_tree(tmp_path / str(clients), clients, 60, 1)
        told = edges_tell(tree)
        run = run_tree(tree, name, clients, families=model, rounds=2)
        assert len(told) == 2
        for part in told:
            weights = TABLE._replace(record=WEIGHTS)
            assert {s: set(arrays) for s, arrays in part.payload.items()} == {
                TABLE: {MEAN, ROUND},
                weights: {MEAN},
            }
            assert part.payload[TABLE][MEAN].nbytes == sizes.table_bytes(10, dimension)
            assert part.payload[weights][MEAN].nbytes + part.payload[TABLE][ROUND].nbytes == 10 * 8 + 8
        # The ledger has counted just these messages.
        links = [window.links["edge-cloud"] for window in run.recorder.record.windows]
        for link, part in zip(links, told, strict=True):
            assert link.up_bytes == part.payload_bytes


def pictures(folder: Path) -> str:
    """Draw two colour images of 32 pixels for each of ten classes."""
    rng = np.random.default_rng(1)
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / str(label) / f"{i}.png")
    return str(folder)


@pytest.mark.parametrize(("pixels", "down"), [("float32", 143_360), ("uint8", 51_200)])
def test_fedktl_with_ten_classes_of_32_pixels_and_512_latents(pixels: str, down: int, tmp_path: Path) -> None:
    gan = random_gan(tmp_path / "gan", size=32, channels=3, latent_dim=512)
    tree = LocalTree(tmp_path, [LocalClient("c0", pictures(tmp_path / "data"))], 1)
    calls, told = tapped(tree), edges_tell(tree)
    run_tree(
        tree,
        "fedktl",
        1,
        families="logistic",
        rounds=2,
        generator=gan,
        alignment_epochs=1,
        pair_pixels=pixels,
    )
    [call] = training(calls, 2).values()
    assert call.sections[REPLY][VECTORS].nbytes == 400
    assert sum(array.nbytes for arrays in call.sections.values() for array in arrays.values()) <= 400
    [pairs] = call.sent_sections.values()
    assert pairs[IMAGES].nbytes + pairs[CENTROIDS].nbytes == down
    assert sum(array.nbytes for array in pairs.values()) == down
    assert down == sizes.pair_bytes(10, (3, 32, 32), 512, pixel_bytes=1 if pixels == "uint8" else 4)
    # Upwards from the edge: the rows and their labels.
    assert {n: a.nbytes for n, a in told[-1].payload[ROWS_SECTION].items()} == {"vectors": 400, "labels": 80}
