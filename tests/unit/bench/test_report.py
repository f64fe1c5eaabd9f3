from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench.report import Outcome, Target, parser, run, show
from matplotlib.figure import Figure


def outcome(tiny: bool) -> Outcome:
    return Outcome(
        rows=[{"size": 1, "seconds": 0.25}, {"size": 2, "note": "x", "seconds": None}],
        targets=[
            Target.at_most("seconds", 0.25, 0.1),
            Target.within("size", 2, 1, 2),
            Target.at_least("tiny", tiny, 1),
        ],
        plots={"line": draw},
        notes=["sizes are in [made-up] units"],
    )


def draw(figure: Figure) -> None:
    figure.subplots().plot([1, 2], [3, 4])


def test_json_is_one_object_and_the_status_is_0_whatever_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("example", outcome, "An example", ["--json", "--tiny"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["bench"] == "example"
    assert printed["machine"]["cores"] >= 1
    assert printed["rows"] == [{"size": 1, "seconds": 0.25}, {"size": 2, "note": "x", "seconds": None}]
    assert printed["targets"] == [
        {"name": "seconds", "value": 0.25, "limit": 0.1, "holds": False},
        {"name": "size", "value": 2, "limit": [1, 2], "holds": True},
        {"name": "tiny", "value": True, "limit": 1, "holds": True},
    ]
    assert printed["notes"] == ["sizes are in [made-up] units"]


def test_without_json_there_is_a_table_and_plots_where_asked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("example", outcome, "An example", ["--out", str(tmp_path / "plots")]) == 0
    table = capsys.readouterr().out
    assert "seconds" in table
    assert "MISSED" in table
    assert "sizes are in [made-up] units" in table
    assert (tmp_path / "plots" / "line.png").read_bytes().startswith(b"\x89PNG")


def test_a_bench_can_have_options_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    options = parser("example", "An example")
    options.add_argument("--clients", type=int, default=4)
    given = options.parse_args(["--clients", "3", "--json"])
    assert show("example", "An example", Outcome(rows=[{"clients": given.clients}]), given) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == [{"clients": 3}]


def test_the_pruning_bench_speaks_this_way(capsys: pytest.CaptureFixture[str]) -> None:
    from bench.pruning import ABOUT, measure

    assert run("pruning", measure, ABOUT, ["--json", "--tiny"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["ratio"] for row in printed["rows"]] == [0.0, 0.2]
    assert all(target["holds"] for target in printed["targets"])
