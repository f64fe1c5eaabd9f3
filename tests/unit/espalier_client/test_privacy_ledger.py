"""What a device spent is never forgotten, and asking again tells nothing new."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from espalier.errors import ConfigError, StateError
from espalier.wire.hello import check_client_hello
from espalier_client.device import Device
from espalier_client.histogram import add_laplace_noise
from espalier_client.privacy_accounting import Mechanism, epsilon_of
from espalier_client.privacy_ledger import LIMIT_DELTA, PrivacyLedger

COUNTS = np.array([0.0, 5.0, 40.0])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_laplace_noise_has_the_scale_of_one_over_epsilon() -> None:
    """Large counts, so that nothing is cut; Kolmogorov-Smirnov against the law."""
    noise = add_laplace_noise(np.full(5000, 1e6), 0.25, rng()) - 1e6
    assert stats.kstest(noise, stats.laplace(scale=4).cdf).pvalue > 0.01
    assert stats.kstest(noise, stats.laplace(scale=5).cdf).pvalue < 1e-3


def device(state: Path | None, **more: object) -> Device:
    """Return a device as a process opens it, which knows of no other."""
    return Device("cam-7", "digits:0/16", device="cpu", state=state, **more)  # type: ignore[arg-type]


def test_a_repeated_hello_tells_nothing_new(tmp_path: Path) -> None:
    """Nor does one after a restart; every edge asks the same device."""
    first = device(tmp_path)
    hello = first.hello("r", 1.0)
    check_client_hello(hello, "edge-1")
    assert hello.histogram.noisy
    told = list(hello.histogram.counts)
    assert told != first.labels.tolist()
    assert list(first.hello("r", 1.0).histogram.counts) == told
    assert list(device(tmp_path).hello("r", 1.0).histogram.counts) == told
    assert first.privacy_ledger.total() == 1.0


def test_a_second_histogram_of_a_run_is_refused(tmp_path: Path) -> None:
    """Two noisy histograms, of one seed above all, would tell the counts."""
    device(tmp_path).hello("r", 1.0)
    with pytest.raises(ConfigError, match="histogram-epsilon=1; a second histogram would spend more privacy"):
        device(tmp_path).hello("r", 2.0)


def test_a_new_run_draws_anew_and_spends_again(tmp_path: Path) -> None:
    here = device(tmp_path)
    a, b = here.hello("a", 1.0), here.hello("b", 0.5)
    noise = [np.array(h.histogram.counts) - here.labels for h in (a, b)]
    assert not np.allclose(noise[0], noise[1])
    assert not np.allclose(2 * noise[0], noise[1])
    assert here.privacy_ledger.total() == 1.5


def test_noise_is_from_the_operating_system(tmp_path: Path) -> None:
    def told(name: str, **more: object) -> list[float]:
        return list(device(tmp_path / name, **more).hello("r", 1.0).histogram.counts)

    assert told("a") != told("b")
    assert told("c", noise_seed=4) == told("d", noise_seed=4) != told("e", noise_seed=5)
    one = device(tmp_path)
    assert one.private_seed(1, "train") != one.private_seed(1, "train")


def test_a_device_without_a_folder_cannot_promise_anything() -> None:
    with pytest.raises(ConfigError, match="cam-7 has no state folder"):
        device(None).hello("r", 1.0)
    assert not device(None).hello("r", 0.0).histogram.noisy


# --- the ledger ----------------------------------------------------------------------------------------


def test_rounds_add_up_over_restarts_and_runs(tmp_path: Path) -> None:
    path = tmp_path / "privacy.json"
    for _ in range(3):
        PrivacyLedger(path).charge("a", "dp-sgd", Mechanism(1.0, 0.1, 5))
    PrivacyLedger(path).charge("a", "dp-sgd", Mechanism(2.0, 0.1, 5))
    PrivacyLedger(path).charge("b", "update", Mechanism(4.0, 1.0, 1))
    found = PrivacyLedger(path)
    assert found.epsilon("a", "dp-sgd", 1e-6) == epsilon_of([(1.0, 0.1, 15), (2.0, 0.1, 5)], 1e-6)
    assert found.epsilon("a", "update", 1e-6) == 0
    assert found.epsilon("c", "update", 1e-6) == 0
    assert found.total() == epsilon_of([(1.0, 0.1, 15), (2.0, 0.1, 5), (4.0, 1.0, 1)], LIMIT_DELTA)
    more = found.epsilon("b", "update", 1e-5, Mechanism(4.0, 1.0, 1))
    assert more == epsilon_of([(4.0, 1.0, 2)], 1e-5)
    assert found.epsilon("b", "update", 1e-5) < more, "asking what a round would cost spends nothing"


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b"]),
            st.sampled_from(["dp-sgd", "update", "histogram"]),
            st.sampled_from([0.7, 2.0, 15.0]),
            st.sampled_from([0.01, 0.4, 1.0]),
            st.integers(1, 50),
        ),
        max_size=6,
    )
)
def test_what_was_spent_never_falls(entries: list[tuple[str, str, float, float, int]]) -> None:
    with TemporaryDirectory() as folder:
        before = 0.0
        for i, (run, kind, noise, rate, steps) in enumerate(entries):
            budget = PrivacyLedger(Path(folder) / "privacy.json")
            if kind == "histogram":
                budget.histogram(f"{run}{i}", COUNTS, rate, rng(i))
            else:
                budget.charge(run, "update" if kind == "update" else "dp-sgd", Mechanism(noise, rate, steps))
            assert budget.total() >= before
            before = budget.total()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"schema": 2}', '{"schema": 1, "runs": {"a": {"dp-sgd": [[0.0, 1.0, 1]]}}}']
)
def test_a_damaged_ledger_is_no_empty_one(content: str, tmp_path: Path) -> None:
    path = tmp_path / "privacy.json"
    path.write_text(content)
    with pytest.raises(StateError, match=r"privacy\.json is damaged"):
        PrivacyLedger(path).charge("a", "dp-sgd", Mechanism(1.0, 0.1, 5))
    assert path.read_text() == content


def test_the_owners_limit_holds_over_all_runs(tmp_path: Path) -> None:
    budget = PrivacyLedger(tmp_path / "privacy.json", limit=4.0)
    budget.histogram("a", COUNTS, 1.0, rng())
    budget.charge("a", "dp-sgd", Mechanism(2.0, 0.1, 20))
    spent = budget.total()
    assert 1 < spent < 4
    with pytest.raises(
        ConfigError, match=r"budget is used up: epsilon would be .* allows 4 \(--privacy-budget\)"
    ):
        budget.charge("b", "dp-sgd", Mechanism(0.5, 0.5, 20))
    with pytest.raises(ConfigError, match="used up"):
        budget.histogram("b", COUNTS, 3.0, rng())
    assert budget.total() == spent
    assert "b" not in json.loads((tmp_path / "privacy.json").read_text())["runs"]


def test_a_budget_keeps_exact_counts_at_home(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exact label counts are not sent; set histogram-epsilon"):
        device(tmp_path, privacy_budget=5.0).hello("r", 0.0)


@pytest.mark.parametrize("budget", [0, -1, "much", "nan", "inf", True])
def test_a_budget_that_is_none(budget: object) -> None:
    with pytest.raises(ConfigError, match=r"privacy-budget=.* is not a number above 0"):
        Device.from_node_config({"name": "c", "data": "digits:0/16", "privacy-budget": budget})
    assert (
        Device.from_node_config({"name": "c", "data": "digits:0/16", "privacy-budget": "2.5"}).privacy_budget
        == 2.5
    )


def test_what_was_spent_survives_a_power_cut(tmp_path: Path, synced: list[Path]) -> None:
    """Before anything leaves the device, the ledger's content and then its rename are on the disk."""
    here = device(tmp_path)
    synced.clear()
    here.privacy_ledger.charge("r", "update", Mechanism(1.0, 1.0, 1))
    assert [path.parent for path in synced[:1]] == synced[1:] == [here.privacy_ledger.path.parent]
    assert synced[0].name.startswith(f".{here.privacy_ledger.path.name}.")
    synced.clear()
    here.privacy_ledger.histogram("r", COUNTS, 1.0, rng())
    assert synced[1:] == [here.privacy_ledger.path.parent]
