"""The report: self-contained, complete, and safe with whatever a client calls itself."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from espalier.errors import StateError
from espalier_server.commands.run_view import describe
from espalier_server.records.charts import Line, column_chart, line_chart, row_chart
from espalier_server.records.events import EventLog, read_events
from espalier_server.records.number_format import number
from espalier_server.records.rebuild import from_events
from espalier_server.records.record import AccuracyEntry, ClientEntry, ModelScore, RunRecord
from espalier_server.records.report import build_report
from espalier_server.records.report_exchange import exchange_cards, own_models
from espalier_server.records.tensorboard import TensorBoardWriter
from espalier_server.run_state import RunState
from tests.support.synthetic_run import draw_samples, made_up_classifier, made_up_exchange, made_up_record

VOID = {"meta", "img", "br", "line", "path", "rect", "circle"}


class Page(HTMLParser):
    """Collects what a page refers to and whether its tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.titles: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")
        ]
        assert tag not in ("script", "link", "iframe", "object")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    draw_samples(folder)
    made_up_record().write(folder)
    build_report(folder)
    return folder


def test_the_page_is_whole_and_self_contained(run: Path) -> None:
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.links) == 12  # the sample grids
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?://|@import|url\(", text)


def test_the_page_holds_the_promised_parts(run: Path) -> None:
    text = (run / "report.html").read_text()
    assert set(Page(text).titles) == {
        "Samples",
        "Training loss",
        "Fréchet distance (digits features)",
        "Inception score (digits features)",
        "Kernel distance (KID) (digits features)",
        "Edges' label distributions",
        "Clients' label distributions",
        "Homogeneity of the edges",
        "Weights of the edges",
        "Payload bytes per link",
        "Time",
        "Windows",
        "Clients",
        "Faults",
        "Configuration",
    }
    newest = base64.b64encode((run / "samples" / "window-0012.png").read_bytes()).decode()
    for part in (
        newest,
        "real images",
        "Gaussian fit",
        "noise",
        "pruned",
        "straggler",
        "prefers-color-scheme:dark",
    ):
        assert part in text
    assert re.search(r'class="changed"><span>eval-data</span>\s*<span class="mono">digits<', text)
    assert re.search(r'class=""><span>seed</span>\s*<span class="mono">2023<', text)


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classified")
    draw_samples(folder, 2)  # even if there were pictures, they are no part of a classifier's page
    made_up_classifier().write(folder)
    build_report(folder)
    return folder


def test_the_page_of_a_classifier(classified: Path) -> None:
    text = (classified / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.links == []
    assert set(page.titles) == {
        "Accuracy",
        "Test loss",
        "Accuracy by class",
        "Accuracy across clients",
        "Groups of clients",
        "Selection of clients",
        "Training loss",
        "Edges' label distributions",
        "Clients' label distributions",
        "Homogeneity of the edges",
        "Weights of the edges",
        "Payload bytes per link",
        "Time",
        "Windows",
        "Clients",
        "Faults",
        "Configuration",
    }
    assert "Fréchet" not in text
    newest = RunRecord.read(classified).accuracy[-1]
    assert newest.mean is not None
    assert newest.worst10 is not None
    best = max(score.accuracy or 0 for score in newest.models.values())
    for part in (
        f"{100 * best:.1f}\u00a0%",
        f"<b>{100 * newest.mean:.1f}\u00a0%</b>",
        f"worst 10\u00a0%: {100 * newest.worst10:.1f}\u00a0%",
        "cluster 0",
        "cluster 1",
        "pow-d",
    ):
        assert part in text


def test_the_table_of_clients(classified: Path, run: Path) -> None:
    record = RunRecord.read(classified)
    rows = re.findall(r"<tr>(<td>client-\d\d.*?)</tr>", (classified / "report.html").read_text(), re.DOTALL)
    cells = [[c.strip() for c in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)] for row in rows]
    assert [row[0] for row in cells] == sorted(record.clients)
    trained = {
        name: sum(p.client == name for w in record.windows for r in w.rounds for p in r.participants)
        for name in record.clients
    }
    for name, edges, samples, data, device, rounds, group, accuracy in cells:
        assert (edges, data, device) == ("edge-1, edge-2", "digits", "cpu")
        assert (int(samples), int(rounds)) == (record.clients[name].samples, trained[name])
        assert group == record.windows[-1].assignments[name]
        assert accuracy == f"{100 * (record.accuracy[-1].clients[name] or 0):.1f}\u00a0%"
    dense = (run / "report.html").read_text()  # no groups, no accuracies: no columns of dashes
    assert "<th>group</th>" not in dense
    assert re.search(r"<th>client</th>\s*<th>edges</th>", dense)


def test_a_classifier_without_measures_or_with_clients_only(tmp_path: Path) -> None:
    record = made_up_classifier(windows=2)
    record.accuracy = []
    record.write(tmp_path)
    assert "Accuracy" not in Page(build_report(tmp_path).read_text()).titles
    record.accuracy = [AccuracyEntry(window=1, round=5, clients={"client-01": 0.5, "client-02": None})]
    record.write(tmp_path)
    text = build_report(tmp_path).read_text()
    assert {"Accuracy", "Accuracy across clients"} <= set(Page(text).titles)
    assert "Test loss" not in Page(text).titles
    assert "<b>50.0\u00a0%</b>" in text


def test_a_record_of_before_classifiers_is_read(tmp_path: Path) -> None:
    content = made_up_record(windows=2).as_dict()
    content.pop("task")
    content.pop("accuracy")
    content["config"].pop("model")
    for window in content["windows"]:
        window.pop("assignments")
        for round_ in window["rounds"]:
            round_.pop("selection")
    (tmp_path / "report.json").write_text(json.dumps(content))
    record = RunRecord.read(tmp_path)
    assert (record.task, record.accuracy, record.windows[0].assignments) == ("diffusion", [], {})
    assert record.windows[0].rounds[0].selection is None
    assert "Samples" not in Page(build_report(tmp_path).read_text()).titles


def test_a_record_keeps_accuracies(tmp_path: Path) -> None:
    record = made_up_classifier(windows=2)
    record.accuracy[0].models["cluster 1"] = ModelScore(accuracy=0.1, loss=float("nan"), classes=[None])
    record.write(tmp_path)
    again = RunRecord.read(tmp_path)
    assert again.task == "classification"
    assert again.accuracy[0].models["cluster 1"] == ModelScore(accuracy=0.1, classes=[None])
    assert again.accuracy[1] == record.accuracy[1]
    written = json.loads((tmp_path / "report.json").read_text())["accuracy"][1]
    assert written["worst10"] == pytest.approx(sum(sorted(written["clients"].values())[:2]) / 2)


def test_names_are_text_never_markup(tmp_path: Path) -> None:
    record = made_up_record()
    evil = "<script>alert(1)</script>"
    record.clients[evil] = ClientEntry(samples=1, labels=[1.0] * 10)
    record.edges = [evil, *record.edges]
    record.classes[0] = evil
    record.reason = record.faults[0].detail = record.config["eval-data"] = evil
    record.windows[0].timings[evil] = 1.0
    record.write(tmp_path)
    text = build_report(tmp_path).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_a_run_that_was_cut_short_is_reported(tmp_path: Path) -> None:
    RunRecord(run="r", method="fedphd").write(tmp_path)
    log = EventLog(tmp_path / "events.jsonl")
    log.write("failed", reason="power cut")
    log.close()
    text = build_report(tmp_path).read_text()
    assert "power cut" in text
    assert json.loads((tmp_path / "report.json").read_text())["status"] == "failed"


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="--out folder of a run"):
        build_report(tmp_path)


def test_the_record_is_rebuilt_from_events(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("run", run="r-1", config={"method": "fedphd", "rounds": 4})
    log.write("joined", edges=["e2", "e1"], clients=["c1"])
    for window in (1, 2, 2):  # window 2 was trained again after a resume
        parts = [{"client": "c1", "edge": "e1"}]
        log.write("window-start", window=window, rounds=[{"round": window, "participants": parts}])
        links = {"client-edge": {"up_bytes": 10 * window, "down_bytes": 5, "messages": window}}
        log.write(
            "window-end", window=window, losses={window: 0.5 / window}, rho={"e1": 1.0}, mu={}, links=links
        )
        log.write(
            "evaluation",
            window=window,
            round=window,
            frechet=9.0 - window,
            features="digits",
            floor={"frechet": 1},
        )
    found = AccuracyEntry(
        window=2, round=2, models={"global": ModelScore(accuracy=0.75)}, clients={"c1": 0.5}
    )
    log.write("accuracy", **found.model_dump())
    log.write("prune", window=2, round=2, params=5, macs=6, params_dense=7, macs_dense=8)
    log.write("fault", tier="edge", node="c1", kind="late", detail="", window=2, round=2)
    log.write("finished", reason="")
    log.close()
    record = from_events(read_events(tmp_path / "events.jsonl"))
    assert (record.run, record.method, record.edges, list(record.clients)) == (
        "r-1",
        "fedphd",
        ["e1", "e2"],
        ["c1"],
    )
    assert [window.losses for window in record.windows] == [[0.5], [0.25]]
    assert [window.links["client-edge"].up_bytes for window in record.windows] == [10, 0]
    assert record.links["client-edge"].up_bytes == 20
    assert [entry.frechet for entry in record.quality] == [8.0, 7.0]
    assert record.accuracy == [found]
    assert (record.model.params, record.model.pruned_at_round) == (5, 2)
    assert record.faults[0].kind == "late"
    build_report(tmp_path)
    assert RunRecord.read(tmp_path).status == "finished"


def test_charts_of_little_or_nothing() -> None:
    assert line_chart([], x_label="x", y_label="y") == ""
    assert line_chart([Line("a", [(1, None)])], x_label="x", y_label="y") == ""
    assert column_chart([], {}, x_label="x", y_label="y") == ""
    assert row_chart({"a": [0.0]}, ["k"]) == ""
    assert "<circle" in line_chart([Line("a", [(1, 0.0)])], x_label="x", y_label="y")
    assert "NaN" not in line_chart(
        [Line("a", [(1, -2.0), (5, None), (9, -2.0)])], x_label="x", y_label="y", log=True
    )


def test_curves_lie_where_their_values_are() -> None:
    chart = line_chart([Line("a", [(0, 0.0), (5, 5.0), (10, 10.0)])], x_label="x", y_label="y")
    points = [tuple(map(float, match)) for match in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert y0 > y2  # SVG counts downwards


def test_columns_are_as_high_as_their_values() -> None:
    chart = column_chart(["1", "2"], {"a": [1.0, 2.0], "b": [1.0, 0.0]}, x_label="x", y_label="y")
    heights = [float(height) for height in re.findall(r'class="bar".*?height="([\d.]+)"', chart)]
    assert len(heights) == 3
    assert heights[0] == heights[1] == pytest.approx(heights[2] / 2, abs=0.1)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\u2013"),
        (0, "0"),
        (1234567, "1\u202f234\u202f567"),
        (12.345, "12.3"),
        (0.5, "0.5"),
        (0.0001, "0.0001"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_tensorboard_gets_the_curves(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    record = made_up_record(windows=2)
    board = TensorBoardWriter(tmp_path)
    for window, quality in zip(record.windows, record.quality, strict=True):
        board.window(window)
        board.evaluation(quality)
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, 11))
    assert losses[3].value == pytest.approx(record.windows[0].losses[3])
    assert events.Scalars("bytes/client-edge/up")[1].value == record.windows[1].links["client-edge"].up_bytes
    assert events.Scalars("quality/frechet")[1].value == pytest.approx(record.quality[1].frechet)


def test_tensorboard_gets_accuracies(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    record = made_up_classifier(windows=2)
    board = TensorBoardWriter(tmp_path)
    for window, found in zip(record.windows, record.accuracy, strict=True):
        board.window(window)
        board.accuracy(found)
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    first, second = record.accuracy
    assert [event.step for event in events.Scalars("accuracy/cluster-1")] == [5, 10]
    for tag, value in (
        ("accuracy/cluster-1", second.models["cluster 1"].accuracy),
        ("test-loss/cluster-0", second.models["cluster 0"].loss),
        ("accuracy/clients/mean", second.mean),
        ("accuracy/clients/worst10", second.worst10),
    ):
        assert events.Scalars(tag)[1].value == pytest.approx(value)
    counts = [events.Scalars(f"clients/cluster-{i}")[1].value for i in range(2)]
    assert sum(counts) == len(first.clients)


def test_the_terminal_tells_accuracies() -> None:
    entry = AccuracyEntry(
        window=3, round=9, models={"global": ModelScore(accuracy=0.912)}, clients={"a": 0.5}
    )
    event = {"event": "accuracy", "time": 0.0, **entry.model_dump()}
    state = RunState()
    state.feed(event)
    text = describe(event, state)
    assert text == "window 3: accuracy: global 91.2 %, clients' mean 50.0 %, worst 10 % 50.0 %"


def test_the_page_of_knowledge_exchange(tmp_path: Path) -> None:
    draw_samples(tmp_path, 3)
    made_up_exchange().write(tmp_path)
    text = build_report(tmp_path).read_text()
    page = Page(text)
    assert page.open == []
    assert {
        "Samples",
        "Accuracy by model",
        "Alignment with the generator",
        "Augmentation (FAug)",
        "Accuracy across clients",
    } <= set(page.titles)
    assert "Knowledge exchange" not in page.titles
    assert len(page.links) == 3
    assert "the generator makes" in text
    assert re.search(r"<td>client-01</td>.{0,200}<td>cnn4</td>", text, re.S)
    assert "resnet10, 4 clients" in text
    for name in ("MMD to the generator", "distance to the centroids", "transfer loss at the clients"):
        assert name in text
    assert re.search(r"client-01</td>.{0,120}0\.750</td>.{0,40}0\.300</td>", text, re.S)


def test_a_family_is_the_mean_of_its_clients(tmp_path: Path) -> None:
    record = made_up_exchange(windows=1)
    record.accuracy[0].clients = {"client-01": 0.5, "client-02": 0.25, "client-03": None, "client-04": 0.75}
    names = {"client-01": "cnn4", "client-04": "cnn4", "client-02": "resnet4", "client-03": "resnet10"}
    record.windows[0].assignments = names
    assert own_models(record) == names
    card = next(c for c in exchange_cards(record) if c.title == "Accuracy by model")
    assert "62.5" in card.body  # (50 + 75) / 2
    assert "cnn4, 2 clients" in card.body
    record.windows[0].assignments = {"client-01": "width 0.5"}
    assert own_models(record) == {}
    assert not next(c for c in exchange_cards(record) if c.title == "Accuracy by model").body


@pytest.mark.parametrize(("sent", "unit"), [(4_000, "kB"), (40_000_000, "MB")])
def test_small_payloads_are_shown_in_kilobytes(sent: int, unit: str, tmp_path: Path) -> None:
    record = made_up_exchange(windows=2)
    for window in record.windows:
        for traffic in window.links.values():
            traffic.up_bytes = traffic.down_bytes = sent
    record.write(tmp_path)
    text = build_report(tmp_path).read_text()
    assert {"kB": "4.00 kB", "MB": "40.00 MB"}[unit] in text
