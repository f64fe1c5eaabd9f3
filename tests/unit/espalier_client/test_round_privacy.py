"""A private round from plan to reply: what is noised, what is kept back, and what the report says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.local_tree import LocalClient, LocalTree
from flwr.app import RecordDict

from espalier.errors import ConfigError, WireError
from espalier.models.arrays import model_arrays
from espalier.training.objectives import TrainingError
from espalier.wire import control
from espalier.wire.sections import MODEL, SectionId
from espalier_client.device import Device
from espalier_client.inquiry import answer
from espalier_client.privacy_accounting import epsilon_of
from espalier_client.round_privacy import noisy_update
from espalier_client.training import train_plain, train_round
from espalier_proto import espalier_pb2 as pb
from espalier_server.records.record import RunRecord
from espalier_server.records.report import render
from tests.support.calls import Call, call, device, report_of, weights_of

FAST: dict[str, Any] = {"method": "fedavg", "model": "logistic", "batch_size": 16, "local_steps": 3}
DP: dict[str, Any] = {**FAST, "dp_sgd_noise": 1.0}
NOISY: dict[str, Any] = {**FAST, "update_clip": 0.5, "update_noise": 2.0}


def answered(made: Call, **changes: Any) -> tuple[RecordDict, pb.ClientReport]:
    plan = made.plan(**changes)
    content = train_round(made.device, plan, made.message(plan, control.TRAIN))
    return content, report_of(content)


def update_of(made: Call, content: RecordDict) -> np.ndarray:
    """Return what the client changed, as one vector."""
    sent = made.sent[MODEL].views()
    got = weights_of(content, made.sent[MODEL].layout).views()
    return np.concatenate([(got[n] - sent[n]).ravel() for n in sent])


def private(state: Path | None, **more: Any) -> Device:
    return Device("c", "digits:0/32", device="cpu", state=state, **more)


# --- clipping and noise ----------------------------------------------------------------------------------


def tensors() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    before = {"a": np.ones((2, 2), np.float32), "b": np.zeros(3, np.float32), "n": np.array(4)}
    return before, {"a": before["a"] + 3.0, "b": before["b"] + np.float32(4), "n": np.array(5)}


def noisy(
    after: dict[str, np.ndarray], before: dict[str, np.ndarray], names: list[str], *more: Any
) -> dict[str, np.ndarray]:
    """Return the noisy update of a reply with the model alone."""
    keys = [(MODEL, name) for name in names]
    return noisy_update({MODEL: after}, {MODEL: before}, keys, *more).get(MODEL, {})


def test_all_tensors_are_clipped_as_one_vector() -> None:
    """Norm of the difference: sqrt(4 * 9 + 3 * 16) = sqrt(84); a counter is none of it."""
    before, after = tensors()
    found = noisy(after, before, ["a", "b", "n"], frozenset({"n"}), 2.0, 0.0, np.random.default_rng())
    factor = 2 / np.sqrt(84)
    np.testing.assert_allclose(found["a"], 1 + 3 * factor, rtol=1e-6)
    np.testing.assert_allclose(found["b"], 4 * factor, rtol=1e-6)
    assert set(found) == {"a", "b"}
    same = noisy(after, before, ["a", "b"], frozenset(), 100.0, 0.0, np.random.default_rng())
    np.testing.assert_allclose(same["a"], after["a"])


def test_noise_is_a_multiple_of_the_clip_and_buffers_say_nothing() -> None:
    before = {"w": np.zeros(20_000, np.float32), "n": np.array(4)}
    after = {"w": np.zeros(20_000, np.float32), "n": np.array(9)}
    found = noisy(after, before, ["w", "n"], frozenset({"n"}), 0.5, 3.0, np.random.default_rng(1))
    assert found["w"].std() == pytest.approx(1.5, rel=0.03)
    assert found["w"].dtype == np.float32
    assert found["n"] == 4


@pytest.mark.parametrize(
    ("change", "names"),
    [({"c": np.ones(2, np.float32)}, ["a", "c"]), ({"a": np.ones(3, np.float32)}, ["a"]), ({}, ["n"])],
)
def test_what_is_no_difference_is_not_sent(change: dict[str, np.ndarray], names: list[str]) -> None:
    before, after = tensors()
    with pytest.raises(TrainingError, match="no received tensor to differ from"):
        noisy(after | change, before, names, frozenset(), 1.0, 1.0, np.random.default_rng())


def test_an_update_that_is_not_finite_is_not_sent() -> None:
    before, after = tensors()
    after["a"][0, 0] = np.inf
    with pytest.raises(TrainingError, match="not finite"):
        noisy(after, before, ["a"], frozenset(), 1.0, 1.0, np.random.default_rng())


def test_sections_are_clipped_as_one_vector_and_noised_each() -> None:
    head, w = SectionId("head"), np.zeros(4, np.float32)
    keys = [(MODEL, "w"), (head, "w")]
    after = {MODEL: {"w": w + np.float32(3)}, head: {"w": w + np.float32(4)}}
    found = noisy_update(
        after, {MODEL: {"w": w}, head: {"w": w}}, keys, frozenset(), 5.0, 0.0, np.random.default_rng()
    )
    np.testing.assert_allclose(found[MODEL]["w"], 3 / 2)  # the norm is sqrt(4 * 9 + 4 * 16) = 10
    np.testing.assert_allclose(found[head]["w"], 4 / 2)
    with pytest.raises(TrainingError, match="no received tensor to differ from"):
        noisy_update(after, {MODEL: {"w": w}}, keys, frozenset(), 5.0, 0.0, np.random.default_rng())


# --- one round -------------------------------------------------------------------------------------------


def test_an_update_is_clipped_without_noise_too() -> None:
    made = call(device(), **FAST, update_clip=1e-3)
    content, report = answered(made)
    assert np.linalg.norm(update_of(made, content)) == pytest.approx(1e-3, rel=1e-3)
    assert np.isfinite(report.loss)


def test_noise_is_not_of_the_runs_seed(tmp_path: Path) -> None:
    """The same plan twice: what the run's seed gives is the same, the noise is not."""
    made = call(private(tmp_path), **NOISY)
    first, second = (update_of(made, answered(made)[0]) for _ in range(2))
    assert first.std() == pytest.approx(1.0, rel=0.1)  # 2 * 0.5, in 650 numbers
    assert (first - second).std() == pytest.approx(np.sqrt(2), rel=0.1)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.2


def test_training_and_its_batches_are_not_of_the_runs_seed(tmp_path: Path) -> None:
    made = call(private(tmp_path), **DP)
    first, second = (update_of(made, answered(made)[0]) for _ in range(2))
    assert not np.allclose(first, second)
    seeded = [call(private(tmp_path / str(i), noise_seed=7), **DP) for i in range(2)]
    one, other = (update_of(made, answered(made)[0]) for made in seeded)
    assert np.array_equal(one, other)


@pytest.mark.parametrize(("settings", "kind"), [(DP, "dp-sgd"), (NOISY, "update")])
def test_nothing_exact_leaves_with_a_private_update(
    settings: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    made = call(private(tmp_path), **settings)
    _, report = answered(made)
    assert np.isnan(report.loss)
    assert set(report.metrics) == {"lr-sum", f"epsilon-{kind}"}


def test_epsilon_goes_on_when_a_round_is_done_again(tmp_path: Path) -> None:
    """The cloud goes back to round 1 and does round 3 again: the state goes back, what was told stays told."""
    rate, spent = 16 / len(device().images), []
    for _ in range(3):
        made = call(Device("c", "digits:0/32", device="cpu", state=tmp_path), **DP)  # a process of its own
        _, report = answered(made)
        spent.append(report.metrics["epsilon-dp-sgd"])
    assert spent == [epsilon_of([(1.0, rate, 3 * n)], 1e-5) for n in (1, 2, 3)]


def test_a_target_is_never_passed(tmp_path: Path) -> None:
    made = call(private(tmp_path), **FAST, dp_sgd_epsilon=2.0, rounds=2)
    reached = [answered(made)[1].metrics["epsilon-dp-sgd"] for _ in range(2)]
    assert reached[0] < reached[1] <= 2.0
    assert reached[1] > 1.9
    with pytest.raises(TrainingError, match=r"above dp-sgd-epsilon=2: rounds were repeated"):
        answered(made)


def test_an_owner_s_budget(tmp_path: Path) -> None:
    with pytest.raises(WireError, match="limits its privacy budget and this run is not private"):
        answered(call(private(tmp_path, privacy_budget=1.0), **FAST))
    with pytest.raises(ConfigError, match="used up"):
        answered(call(private(tmp_path, privacy_budget=1.0), **DP))
    answered(call(private(tmp_path, privacy_budget=20.0), **DP))


def test_without_a_folder_there_is_no_private_round() -> None:
    for settings in (DP, NOISY):
        with pytest.raises(ConfigError, match="no state folder"):
            answered(call(private(None), **settings))


@pytest.mark.parametrize("inquiry", ["loss", "batch-loss", "gradient", "statistics", "samples"])
def test_exact_answers_are_refused(inquiry: str, tmp_path: Path) -> None:
    made = call(private(tmp_path), **NOISY)
    plan = made.plan(inquiry=inquiry)
    with pytest.raises(WireError, match="whose exact answer reveals information on the images"):
        answer(made.device, plan, made.message(plan, control.INQUIRY))


def test_test_images_are_no_part_of_it(tmp_path: Path) -> None:
    made = call(private(tmp_path), **NOISY)
    plan = made.plan(inquiry="accuracy")
    assert report_of(answer(made.device, plan, made.message(plan, control.INQUIRY))).metrics["total"] > 0


def test_a_plain_flower_run_cannot_count_what_is_spent(tmp_path: Path) -> None:
    from flwr.app import ArrayRecord

    from espalier.flower.arrays import array_from_numpy

    made = call(private(tmp_path), **DP)
    arrays = ArrayRecord({n: array_from_numpy(a) for n, a in model_arrays(made.model).items()})
    with pytest.raises(ConfigError, match="needs an Espalier run"):
        train_plain(made.device, arrays, 1, made.settings.to_flat(), RecordDict())


# --- whole runs --------------------------------------------------------------------------------------------

CLIENTS = [LocalClient(f"c{i}", f"digits:{i}/48", (i % 2,)) for i in range(3)]


def run(folder: Path, **settings: Any) -> RunRecord:
    tree = LocalTree(folder, CLIENTS, 2)
    base = {"rounds": 2, "rg": 1, "min-clients": 3, "min-edges": 2, "batch-size": 8, "keep-checkpoints": 1}
    return tree.run("r", base | {k.replace("_", "-"): v for k, v in settings.items()}).recorder.record


def of_sgd(record: RunRecord, noise: float) -> Callable[[str], float]:
    def spent(client: str) -> float:
        images = record.clients[client].samples
        return epsilon_of([(noise, 8 / images, 2 * int(np.ceil(images / 8)))], 1e-5)

    return spent


def test_the_report_says_what_every_client_spent(tmp_path: Path) -> None:
    record = run(
        tmp_path, method="fedavg", model="cnn", dp_sgd_noise=1.5, histogram_epsilon=0.5, codec="qsgd"
    )
    assert record.status == "finished"
    assert not record.faults
    expected = of_sgd(record, 1.5)
    for name, client in record.clients.items():
        assert client.privacy.dp_sgd == pytest.approx(expected(name))
        assert client.privacy.histogram == 0.5
        assert client.privacy.update is None
    assert [w["losses"] for w in record.as_dict()["windows"]] == [[None], [None]]
    again = RunRecord.read(tmp_path / "runs" / "r")
    assert again.clients["c0"].privacy == record.clients["c0"].privacy
    page = render(again, tmp_path / "runs" / "r")
    assert "ε DP-SGD" in page
    assert "ε labels" in page
    assert f"{expected('c0'):.3g}" in page


@pytest.mark.parametrize(
    "settings",
    [
        {
            "method": "fedphd",
            "model": "unet-tiny",
            "dp_sgd_noise": 1.0,
            "pruning_ratio": 0.0,
            "rounds": 1,
            "local_steps": 1,
            "eval_samples": 2,
            "sample_count": 1,
            "sample_steps": 1,
        },
        {"method": "scaffold", "model": "mlp", "update_clip": 1.0, "update_noise": 4.0},
        {"method": "feddyn", "model": "mlp", "dp_sgd_epsilon": 8.0, "selection": "uniform"},
        {"method": "fjord", "model": "cnn", "update_clip": 1.0, "update_noise": 4.0, "levels": "1,0.5"},
        {"method": "moon", "model": "cnn", "update_clip": 1.0, "update_noise": 4.0, "codec": "fp16"},
    ],
    ids=lambda s: str(s["method"]),
)
def test_methods_run_under_privacy(settings: dict[str, Any], tmp_path: Path) -> None:
    record = run(tmp_path, **settings)
    assert record.status == "finished", record.reason
    assert not record.faults
    for client in record.clients.values():
        if "update_noise" in settings:
            # Two updates of sensitivity 2 C under noise of 4 C.
            assert client.privacy.update == pytest.approx(epsilon_of([(2.0, 1.0, 2)], 1e-5))
        else:
            assert client.privacy.dp_sgd is not None
            assert 0 < client.privacy.dp_sgd <= settings.get("dp_sgd_epsilon", 100)
