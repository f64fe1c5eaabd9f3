"""`bench.knowledge` in its tiny form: it runs, and its bytes are those of the methods' formulas."""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.cells import Measured, Point, Setup
from bench.claims import accuracies
from bench.faug import HIDDEN, PAPERS, PARAMETERS, ROUNDS, WIDTHS, PaperRun, targets
from bench.fedktl_ablation import CLIPPED, MU0, ORACLE, VARIANTS, RealImages
from bench.knowledge import LABELS, edge_targets, main
from bench.knowledge_setup import (
    FAMILY,
    REGIMES,
    SHOTS,
    Generators,
    cloud_edge_cells,
    of_one_length,
    table_cells,
)

from espalier.data.spec import open_data
from espalier.generators.base import open_generator
from espalier.methods.run_config import RunConfig, with_defaults
from espalier.models.classifiers import CNN, CNNArguments
from tests.support.generators import random_gan


def test_it_runs_and_saves_its_generators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--tiny", "--out", str(tmp_path)]) == 0
    output = json.loads(capsys.readouterr().out)
    rows = {(row["part"], row["method"]): row for row in output["rows"]}
    assert all(row["status"] == "finished" and 0 <= row["clients"] <= 100 for row in output["rows"])
    local, fd, proto, transfer = (
        rows["few-shot", name] for name in ("local only", "FD", "FedProto", "FedKTL")
    )
    # Four clients and two edges, a round: FD's tables are 10 x 10 up. FedProto's are 10 x 512.
    assert local["client_edge_up_kb"] == fd["client_edge_up_kb"] > 4 * 0.4
    more = proto["client_edge_up_kb"] - fd["client_edge_up_kb"]
    assert more == pytest.approx(4 * 10 * (512 - 10) * 4 / 1000, rel=0.02)
    # One table for each edge instead of one for each client.
    more = proto["edge_cloud_up_kb"] - fd["edge_cloud_up_kb"]
    assert more == pytest.approx(2 * 10 * (512 - 10) * 4 / 1000, rel=0.02)
    assert transfer["client_edge_up_kb"] == pytest.approx(fd["client_edge_up_kb"], rel=0.1)
    # FAug's generator goes to each of ten devices, at 8 pixels.
    widths = (128, 256, 512, 1024, 64)
    size = sum((a + 1) * b for a, b in pairwise(widths))
    with_seeds, without = (rows["FAug's set-up", name]["bits_a_device"] for name in ("FD + FAug", "FD"))
    assert with_seeds - without == pytest.approx(32 * size, rel=0.01)
    for name in ("digits", "digits-untrained"):
        assert (tmp_path / "generator" / name / "samples.png").exists()
    assert (tmp_path / "knowledge.png").stat().st_size > 10_000


def test_one_client_without_a_federation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = ["--parts", "cloud-edge", "transfer"]
    assert main(["--json", "--tiny", "--clients", "1", *parts, "--out", str(tmp_path)]) == 0
    output = json.loads(capsys.readouterr().out)
    assert [(row["part"], row["method"]) for row in output["rows"][:4]] == [
        ("23 shots", "local only"),
        ("23 shots", "FedKTL, mu=0"),
        ("23 shots", "FedKTL"),
        ("23 shots", "FedKTL, mu=50"),
    ]
    assert {row["status"] for row in output["rows"]} == {"finished"}
    names = [target["name"].partition(":")[0] for target in output["targets"]]
    assert names == ["cloud-edge"] * 4 + ["transfer"] * 2
    ablation = {row["method"]: row for row in output["rows"] if row["part"] == "transfer, 2 shots"}
    assert tuple(ablation) == tuple(VARIANTS)
    # There is one round of two steps, so no pairs were received yet: only clipping makes a difference.
    assert ablation["FedKTL"]["by_seed"] == ablation[MU0]["by_seed"] == ablation[ORACLE]["by_seed"]
    assert ablation["FedKTL"]["by_seed"] != ablation[CLIPPED]["by_seed"]
    # Real images differ from those of a generator trained for three steps; the latents are the same.
    assert ablation["FedKTL"]["images_apart"] != ablation[ORACLE]["images_apart"]
    assert ablation["FedKTL"]["centroids_apart"] == ablation[ORACLE]["centroids_apart"] > 0
    assert (tmp_path / "cloud-edge.png").stat().st_size > 10_000


def test_the_settings_of_every_cell_are_valid() -> None:
    setup, generators = Setup(seeds=1), Generators(Path("a"), Path("b"))
    table = table_cells(setup, FAMILY, generators, {"rounds": 2}, list(product(REGIMES, LABELS)))
    edge = cloud_edge_cells(setup, generators, {"rounds": 2}, list(SHOTS))
    for group in (*table.values(), *edge.values()):
        RunConfig.from_flat(with_defaults({"model": "mlp", **group[0].settings}, {}))
    assert ("few-shot", "FD + FAug") not in table  # there, no client lacks a label
    assert {cells[0].setup.clients for cells in edge.values()} == {1}
    assert of_one_length("cnn4,mlp,resnet4") == "cnn4,resnet4"
    assert of_one_length("mlp,cnn") == "mlp"


def test_the_oracle_returns_a_real_image_of_each_class(tmp_path: Path) -> None:
    data, generator = open_data("digits"), open_generator(random_gan(tmp_path / "gan"))
    drawn = RealImages(generator, data, 1).synthesise(torch.zeros(10, generator.latent_dim), 8, 1)
    places = [(data.fetch(np.arange(len(data))) == image).flatten(1).all(1) for image in drawn]
    found = [set(np.asarray(data.labels)[place.numpy()].tolist()) for place in places]
    assert all(label in seen for label, seen in enumerate(found))


def test_the_best_round_is_not_the_last() -> None:
    points = [Point(r, None, mean, mean / 2) for r, mean in enumerate((0.2, 0.7, 0.4, 0.5, 0.6), 1)]
    run = Measured(points)
    assert (run.best.round, run.best.mean) == (2, 0.7)
    assert run.last.mean == pytest.approx(0.5)
    assert accuracies([run, Measured(points[:1])], "mean", best=True) == pytest.approx(45)
    assert Measured([]).best.mean is None


def test_the_papers_size_of_a_network() -> None:
    network = CNN(CNNArguments(in_channels=1, sample_size=28, classes=10, widths=WIDTHS, hidden=HIDDEN))
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS
    assert 2 * ROUNDS * PARAMETERS * 32 == 1_228_439_552


def test_targets_can_fail() -> None:
    def run(mean: float) -> list[Measured]:
        return [Measured([Point(1, None, mean, None)])]

    flat = {(s, label): run(0.5) for s in SHOTS for label in ("local only", "FedKTL", "FedKTL, mu=0")}
    assert not any(t.holds for t in edge_targets(flat))
    growing = flat | {(s, "FedKTL"): run(0.5 + 0.1 / s) for s in SHOTS}
    assert all(t.holds for t in edge_targets(growing))
    found = {"FD": [PaperRun(0.7, 1e5)], "FD + FAug": [PaperRun(0.74, 50e6)], PAPERS: [PaperRun(0.9, 1.23e9)]}
    judged = targets(found, "mnist", ROUNDS)
    assert [t.holds for t in judged] == [False, True, False]
    assert len(targets(found, "digits", ROUNDS)) == len(targets(found, "mnist", 2)) == 1
