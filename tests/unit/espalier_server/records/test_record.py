"""The record of a run and its JSON form."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from espalier.errors import StateError
from espalier_server.records.record import Participation, RoundEntry, RunRecord, WindowEntry


def test_record_comes_back_and_holds_what_the_readers_expect(tmp_path: Path) -> None:
    a, b = Participation(client="a", edge="e"), Participation(client="b", edge="e")
    rounds = [
        RoundEntry(round=1, loss=0.5, participants=[b, a]),
        RoundEntry(round=2, loss=math.nan, participants=[a]),
    ]
    window = WindowEntry(window=1, rounds=rounds, rho={"e": 1.0}, mu={"e": 0.7})
    record = RunRecord(method="fedphd", windows=[window])
    record.write(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["windows"][0]["losses"] == [0.5, None]
    assert content["windows"][0]["participants"] == ["a", "b"]
    assert content["windows"][0]["rho"] == {"e": 1.0}
    assert set(content["links"]["client-edge"]) == {"up_bytes", "down_bytes", "messages"}
    assert set(content["model"]) >= {"params", "macs", "params_dense", "macs_dense"}
    assert RunRecord.read(tmp_path).as_dict() == content


@pytest.mark.parametrize("content", [None, "{", '{"windows": 3}'])
def test_what_is_no_record(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(StateError, match=r"report\.json"):
        RunRecord.read(tmp_path)
