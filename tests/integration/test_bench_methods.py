"""`bench.methods` in its tiny form: it runs, its table is complete, and results are reused with ``--resume``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench import loss_ranking
from bench.cells import Cell, Measured, Point, Setup, run_cells
from bench.claims import Variant, fewer_rounds, mean_rounds
from bench.methods import main, methods, table_cells
from bench.regimes import CLAIMS

from espalier.methods.run_config import RunConfig, with_defaults

LINKS = [f"{link}_{way}_kb" for link in ("client_edge", "edge_cloud") for way in ("up", "down")]


def test_it_runs_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--json", "--tiny", "--jobs", "1", "--out", str(tmp_path)]
    assert main(options) == 0
    output = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in output["rows"]] == ["fedavg", "scaffold", "ifca"]
    for row in output["rows"]:
        assert row["status"] == "finished"
        assert 0 <= row["worst10"] <= row["clients"] <= 100
        assert all(row[link] > 0 for link in LINKS)
    averaged, controlled, clustered = output["rows"]
    # Four clients reply to two edges, which send two partial sums to the cloud.
    assert 1.8 < averaged["client_edge_up_kb"] / averaged["edge_cloud_up_kb"] < 2
    assert clustered["accuracy"] is None
    assert controlled["client_edge_down_kb"] > 1.8 * averaged["client_edge_down_kb"]
    assert controlled["client_edge_up_kb"] < 1.1 * averaged["client_edge_up_kb"]
    assert (tmp_path / "methods.png").stat().st_size > 10_000

    monkeypatch.setattr("bench.cells.run_cell", lambda cell: pytest.fail("it ran again"))
    assert main([*options, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == output["rows"]


def test_the_settings_of_every_cell_are_valid() -> None:
    """Contradictory settings would otherwise fail only after minutes of a run."""
    setup = Setup(seeds=1)
    groups = [
        *table_cells(setup, methods(), tiny=False).values(),
        *loss_ranking.cells(setup).values(),
        *(cells for claim in CLAIMS for cells in claim.cells(setup).values()),
    ]
    flat = [with_defaults({"model": "mlp", **cells[0].settings}, {}) for cells in groups]
    assert {RunConfig.from_flat(settings).method for settings in flat} == set(methods())
    assert len({cells[0].key() for cells in groups}) == len(groups)


def test_the_shares_of_clients() -> None:
    """Four clients hold the first of 14 shares, every third one, or even ones with an odd one for the minority."""
    setup = Setup("digits", clients=4, edges=2, images=100)

    def numbers(cell: Cell) -> list[str]:
        assert all(spec.startswith("digits:") for spec in cell.specs())
        return [spec.split(":")[1] for spec in cell.specs()]

    assert numbers(Cell(setup, "iid", {})) == ["0/14", "1/14", "2/14", "3/14"]
    assert numbers(Cell(setup, "iid", {}, present=2)) == ["0/14", "1/14"]
    assert numbers(Cell(setup, "similarity=0", {})) == ["0/14", "3/14", "6/14", "9/14"]
    assert numbers(Cell(setup, "iid+rotate=2", {}, minority=1)) == ["0/14", "2/14", "4/14", "7/14"]
    assert Cell(setup, "iid+rotate=2", {}, 5).specs()[1] == "digits:1/14:iid,seed=5+rotate=2"


def test_levels_are_assigned_by_data(tmp_path: Path) -> None:
    setup = Setup("digits", clients=3, edges=1, images=100)
    settings = {**loss_ranking.SETTINGS, "rounds": 1, "local-steps": 1, "eval-every": 1, "fraction": 1.0}
    cells = {
        devices: Cell(setup, "iid+lognormal=1.0", settings, devices=devices)
        for devices in loss_ranking.DEVICES
    }
    found = run_cells(cells.values(), 1, tmp_path)
    with_data, against = (found[cell.key()] for cell in cells.values())
    assert (with_data.status, against.status) == ("finished", "finished")
    # One client of each width either way.
    assert with_data.links == against.links


def test_rounds_to_a_target() -> None:
    def run(*accuracies: float) -> Measured:
        return Measured([Point(2 * i + 2, a, None, None) for i, a in enumerate(accuracies)])

    assert mean_rounds([run(0.1, 0.5, 0.4), run(0.5)], 0.5) == (4 + 2) / 2
    assert mean_rounds([run(0.1, 0.2)], 0.5) == 5
    claim = CLAIMS[0]
    judge = fewer_rounds("a", "b")
    assert not judge(claim, {"a": [run(0.1)], "b": [run(0.1)]})[0].holds
    assert judge(claim, {"a": [run(0.1, 0.9)], "b": [run(0.9)]})[0].holds
    assert not judge(claim, {"a": [run(0.9)], "b": [run(0.9)]})[0].holds
    assert Variant({}).present == 0
