"""Classes and image sizes are agreed on at hello: a client that does not fit is excluded and notified."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from bench.local_tree import LocalClient, LocalTree
from flwr.app import ConfigRecord, Context, Message, RecordDict
from PIL import Image

from espalier.wire import control
from espalier_client.app import app

SHORT: dict[str, bool | int | float | str] = {
    "method": "fd",
    "model": "logistic",
    "rounds": 1,
    "rg": 1,
    "min-edges": 2,
    "min-clients": 2,
    "local-steps": 1,
}


def pictures(folder: Path, labels: list[str], size: int = 8) -> Path:
    """Write four grey images of each label."""
    rng = np.random.default_rng(0)
    for label in labels:
        (folder / label).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(256, size=(size, size), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    ("labels", "size", "words"),
    [
        (["cat", "dog"], 8, "its classes ['cat', 'dog']… are not those of c0"),
        (list("0123456789"), 12, "its images are [1, 32, 32], those of c0 [1, 8, 8]"),
    ],
    ids=["classes", "size"],
)
def test_a_client_that_does_not_fit_is_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, labels: list[str], size: int, words: str
) -> None:
    data = f"{pictures(tmp_path / 'pictures', labels, size)}"
    clients = [LocalClient(f"c{i}", f"digits:{i}/16", (0, 1)) for i in range(2)]
    tree = LocalTree(tmp_path / "tree", [*clients, LocalClient("stranger", data, (0, 1))], 2)
    with caplog.at_level(logging.ERROR, "espalier.client"):
        record = tree.run("agreed", SHORT).recorder.record
    assert record.status == "finished"
    [fault] = record.faults
    assert (fault.node, fault.kind) == ("stranger", "refused")
    assert words in fault.detail
    assert record.windows[0].participants == ["c0", "c1"]
    # Once, though both edges know it.
    told = [r.getMessage() for r in caplog.records if r.name == "espalier.client"]
    assert told == [f"left out of run agreed: {fault.detail}"]


def test_a_refusal_is_one_line_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = ConfigRecord({"run": "r", "fault": "a\nb" + 10_000 * "c"})
    message = Message(RecordDict({control.CONFIG: record}), 1, control.REFUSAL)
    with caplog.at_level(logging.ERROR, "espalier.client"):
        app(message, Context(1, 1, {}, RecordDict(), {}))
    [line] = [r.getMessage() for r in caplog.records]
    assert line.startswith("left out of run r: a?bccc")
    assert len(line) < 600
