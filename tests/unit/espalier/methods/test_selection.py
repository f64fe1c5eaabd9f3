"""Who trains: the draws against probabilities worked out by hand, the rules against brute force."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.config.run_config import RunConfig
from espalier.methods.planning import Member, pick_clients
from espalier.methods.power_of_choice import adaptive_count
from espalier.methods.selection import (
    Answer,
    Proportional,
    Selection,
    create_selection,
    shares,
    top,
)


def member(name: str, samples: int = 10) -> Member:
    return Member(name, samples, np.ones(2), ("edge-1",))


def crowd(samples: Sequence[int]) -> list[Member]:
    return [member(f"c{i:02d}", n) for i, n in enumerate(samples)]


def rule(name: str, **settings: object) -> Selection:
    return create_selection(RunConfig.from_flat(settings_of(settings)), name)


def settings_of(settings: Mapping[str, object]) -> dict[str, object]:
    return {k.replace("_", "-"): v for k, v in settings.items()}


def names(members: Sequence[Member]) -> list[str]:
    return [m.name for m in members]


def losses(**values: float) -> dict[str, Answer]:
    return {name: Answer({"loss": value}) for name, value in values.items()}


def chi_square(found: Counter[tuple[str, ...]], expected: Mapping[tuple[str, ...], float]) -> float:
    """Pearson's statistic; `expected` are probabilities."""
    assert set(found) <= set(expected)
    total = sum(found.values())
    return sum((found[k] - total * p) ** 2 / (total * p) for k, p in expected.items())


# --- without a probe ------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.01, 0.3, 1.0])
def test_uniform_is_the_plain_draw(fraction: float) -> None:
    members = crowd([5] * 10)
    selection = rule("uniform", fraction=fraction, seed=7)
    for round_ in range(1, 6):
        picks = selection.candidates(round_, members[::-1])
        assert names(picks) == names(pick_clients(members, fraction, 7, round_))
        assert selection.choose(round_, picks, {}) == picks
        assert selection.later(round_, members) == (picks, 0)
    assert selection.weighting == "samples"
    assert selection.probe == ""


def test_proportional_draws_by_samples() -> None:
    """Two draws of chances .5, .3, .2: the pairs' chances are products; duplicates collapse."""
    members = crowd([5, 3, 2])
    p = {"c00": 0.5, "c01": 0.3, "c02": 0.2}
    expected: dict[tuple[str, ...], float] = {}
    for a, b in itertools.product(p, p):
        key = tuple(sorted({a, b}))
        expected[key] = expected.get(key, 0.0) + p[a] * p[b]
    found: Counter[tuple[str, ...]] = Counter()
    selection = rule("proportional", fraction=0.67, seed=3)
    assert isinstance(selection, Proportional)
    for round_ in range(1, 3001):
        drawn = selection.draws(round_, members)
        assert sum(drawn.values()) == 2
        picks = names(selection.candidates(round_, members))
        assert picks == list(drawn)
        found[tuple(picks)] += 1
    assert chi_square(found, expected) < 20.5  # 5 degrees of freedom, 0.1 %
    assert selection.weighting == "uniform"


def test_bernoulli() -> None:
    members = crowd([1] * 20)
    selection = rule("bernoulli", fraction=0.3, seed=1)
    counts = [len(selection.candidates(r, members)) for r in range(1, 401)]
    # 8000 coins of chance 0.3: standard deviation sqrt(8000 * 0.21) = 41
    assert abs(sum(counts) - 2400) < 4 * 41
    # binomial variance 20 * 0.21 = 4.2; a fixed number would have none
    assert 3.2 < np.var(counts) < 5.3
    alone = rule("bernoulli", fraction=1e-9, seed=1)
    found = Counter(names(alone.candidates(r, members))[0] for r in range(1, 401))
    assert all(len(alone.candidates(r, members)) == 1 for r in range(1, 401))
    assert len(found) == 20
    everyone = rule("bernoulli", fraction=1.0, seed=1)
    assert everyone.candidates(1, members) == members


def test_bernoulli_coin_does_not_depend_on_the_others() -> None:
    selection = rule("bernoulli", fraction=0.5, seed=9)
    few, many = crowd([1] * 10), crowd([1] * 30)
    for round_ in range(1, 20):
        of_few, of_many = (set(names(selection.candidates(round_, c))) for c in (few, many))
        if len(of_few) > 1:
            assert of_few == of_many & set(names(few))


# --- Power-of-Choice ------------------------------------------------------------------------------


def test_everyone_a_candidate_gives_the_largest_losses() -> None:
    """heterogeneity.md §10.11, first half: d = K takes the m largest losses, ties by name."""
    members = crowd([1, 9, 5, 2, 7])
    selection = rule("pow-d", fraction=0.4, candidates=5)
    for round_ in range(1, 10):
        asked = selection.candidates(round_, members)
        assert asked == members
        picks = selection.choose(round_, asked, losses(c00=1.0, c01=3.0, c02=0.5, c03=2.0, c04=2.0))
        assert names(picks) == ["c01", "c03"]
    assert selection.probe == "loss"
    assert selection.weighting == "uniform"


def test_a_large_clients_loss_can_be_given_more_say() -> None:
    """n_k F_k of c00 … c04: 1·1 = 1, 9·0.25 = 2.25, 5·0.5 = 2.5, 2·2 = 4, 7·0 = 0."""
    members = crowd([1, 9, 5, 2, 7])
    told = losses(c00=1.0, c01=0.25, c02=0.5, c03=2.0, c04=0.0)
    for weight, expected in (("none", ["c00", "c03"]), ("samples", ["c02", "c03"])):
        selection = rule("pow-d", fraction=0.4, candidates=5, loss_weight=weight)
        assert names(selection.choose(1, selection.candidates(1, members), told)) == expected
        remembered = rule("rpow-d", fraction=0.4, candidates=5, loss_weight=weight)
        remembered.observe(1, {name: answer.metrics for name, answer in told.items()}, {})
        assert names(remembered.candidates(2, members)) == expected


def test_only_who_answered_is_chosen() -> None:
    members = crowd([1] * 5)
    selection = rule("pow-d", fraction=0.4, candidates=5)
    asked = selection.candidates(1, members)
    picks = selection.choose(1, asked, {**losses(c00=1.0, c03=0.1, stranger=9.0), "c01": Answer({})})
    assert names(picks) == ["c00", "c03"]
    assert selection.choose(1, asked, {}) == []


def successive(p: Mapping[str, float], size: int) -> dict[tuple[str, ...], float]:
    """Chance of each set when `size` names are drawn one after the other without replacement."""
    found: dict[tuple[str, ...], float] = {}
    for order in itertools.permutations(p, size):
        chance, left = 1.0, 1.0
        for name in order:
            chance *= p[name] / left
            left -= p[name]
        key = tuple(sorted(order))
        found[key] = found.get(key, 0.0) + chance
    return found


@pytest.mark.parametrize("name", ["pow-d", "cpow-d", "rpow-d"])
def test_as_many_candidates_as_picks_is_proportional_sampling(name: str) -> None:
    """heterogeneity.md §10.11, second half: d = m is sampling ∝ p_k, whatever the losses."""
    members = crowd([1, 2, 3, 4])
    selection = rule(name, fraction=0.5, candidates=2, seed=11)
    expected = successive({"c00": 0.1, "c01": 0.2, "c02": 0.3, "c03": 0.4}, 2)
    found: Counter[tuple[str, ...]] = Counter()
    answers = losses(c00=9.0, c01=1.0, c02=5.0, c03=0.0)
    for round_ in range(1, 3001):
        asked = selection.candidates(round_, members)
        found[tuple(names(selection.choose(round_, asked, answers)))] += 1
        assert selection.later(round_, members) == (asked, 0)
    assert chi_square(found, expected) < 20.5  # 5 degrees of freedom, 0.1 %


def test_number_of_candidates() -> None:
    members = crowd([1] * 10)

    def count(**settings: object) -> int:
        return len(rule("pow-d", **settings).candidates(1, members))

    assert count(fraction=0.3) == 6
    assert count(fraction=0.8) == 10
    assert count(fraction=0.3, candidates=1) == 3
    assert count(fraction=0.3, candidates=7) == 7
    assert count(fraction=0.3, candidates=99) == 10
    assert len(rule("pow-d", fraction=0.5, candidates=4).candidates(1, crowd([0, 5, 0, 0, 5, 5]))) == 3
    assert len(rule("pow-d", fraction=0.5, candidates=4).candidates(1, crowd([0, 0, 0, 0, 0]))) == 4


def test_later_rounds_are_for_the_edges() -> None:
    members = crowd([1] * 10)
    for name, probe in (("pow-d", "loss"), ("cpow-d", "batch-loss")):
        selection = rule(name, fraction=0.3)
        found, keep = selection.later(2, members)
        assert (len(found), keep) == (6, 3)
        assert found == selection.candidates(2, members)
        assert selection.probe == probe


def test_remembered_losses() -> None:
    members = crowd([1] * 6)
    selection = rule("rpow-d", fraction=0.34, candidates=6, seed=4)
    assert selection.probe == ""
    # c01 and c04 are unseen and come first, whatever the others' losses
    seen = {"c00": {"loss": 50.0}, "c02": {"loss": 0.3}, "c03": {"loss": 7.0}, "c05": {"loss": 0.1}}
    selection.observe(1, seen, {})
    assert names(selection.candidates(2, members)) == ["c01", "c04"]
    selection.observe(2, {"c01": {"loss": 1.0}}, {})
    assert names(selection.candidates(3, members)) == ["c00", "c04"]
    selection.observe(3, {"c00": {"loss": 0.0}, "c04": {"loss": 2.0}}, {})
    picks = selection.candidates(4, members)
    assert names(picks) == ["c03", "c04"]
    assert selection.choose(4, picks, {}) == picks
    assert selection.later(4, members) == (picks, 0)
    selection.observe(4, {"c03": {"loss": math.nan}, "c04": {}}, {})
    assert names(selection.candidates(5, members)) == ["c03", "c04"]

    again = rule("rpow-d", fraction=0.34, candidates=6, seed=4)
    state = selection.state()
    assert state["loss/c03"].shape == (1,)
    again.restore(state)
    assert again.state() == state
    assert again.candidates(5, members) == selection.candidates(5, members)


def test_unseen_ties_are_drawn_anew_in_every_round() -> None:
    members = crowd([1] * 6)
    selection = rule("rpow-d", fraction=0.17, candidates=6, seed=4)
    found = Counter(names(selection.candidates(r, members))[0] for r in range(1, 301))
    # 300 draws among six: mean 50, standard deviation 6.5
    assert set(found) == set(names(members))
    assert max(found.values()) < 80
    twin = rule("rpow-d", fraction=0.17, candidates=6, seed=4)
    assert twin.candidates(3, members) == selection.candidates(3, members)


def test_adaptive_schedule() -> None:
    """N = 16, m = 3: d = 16, 8, 4, 3, each for a quarter of the run."""
    assert [adaptive_count(r, 8, 16, 3) for r in range(1, 9)] == [16, 16, 8, 8, 4, 4, 3, 3]
    # N = 10, m = 2: d = 10, 5, 3, 2 over 6 rounds: stage floor((r - 1) * 4 / 6)
    assert [adaptive_count(r, 6, 10, 2) for r in range(1, 7)] == [10, 10, 5, 3, 3, 2]
    assert [adaptive_count(r, 3, 4, 4) for r in range(1, 4)] == [4, 4, 4]
    assert adaptive_count(1, 1, 100, 1) == 100
    members = crowd([1] * 16)
    selection = rule("pow-d", fraction=0.1875, adaptive_candidates=True, candidates=5, rounds=8)
    assert [len(selection.candidates(r, members)) for r in range(1, 9)] == [16, 16, 8, 8, 4, 4, 3, 3]
    assert [selection.later(r, members)[1] for r in range(1, 9)] == [3, 3, 3, 3, 3, 3, 0, 0]


def test_top() -> None:
    values = {"b": 1.0, "a": 1.0, "d": math.inf, "c": math.nan, "e": -2.0}
    assert top(values, 5) == ["d", "a", "b", "e", "c"]
    assert top(values, 2) == ["d", "a"]
    assert top(values, 0) == []
    assert top({}, 3) == []


def test_shares_by_hand() -> None:
    # 5 of 10: 3.5, 1, 0.5 -> 3, 1, 0 and one left; remainders of a and c are equal, so a has it
    assert shares({"a": 7, "b": 2, "c": 1}, 5) == {"a": 4, "b": 1, "c": 0}
    # 4 of 9: 2.22, 1.33, 0.44 -> 2, 1, 0 and the one left to c
    assert shares({"a": 5, "b": 3, "c": 1}, 4) == {"a": 2, "b": 1, "c": 1}
    assert shares({"a": 2, "b": 1}, 7) == {"a": 2, "b": 1}
    assert shares({}, 3) == {}


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(0, 30)), st.integers(0, 60))
def test_shares_add_up(counts: dict[str, int], m: int) -> None:
    parts = shares(counts, m)
    total = sum(counts.values())
    assert sum(parts.values()) == min(m, total)
    for edge, count in counts.items():
        assert 0 <= parts[edge] <= count
        if m < total:
            assert abs(parts[edge] - m * count / total) < 1


# --- DivFL ----------------------------------------------------------------------------------------


def gradient(*values: float) -> dict[str, np.ndarray]:
    """Two tensors; their order must not matter."""
    return {"b.weight": np.array([values[1:]]), "a.weight": np.array(values[:1])}


def grads(**values: tuple[float, ...]) -> dict[str, Answer]:
    return {name: Answer({}, gradient(*v)) for name, v in values.items()}


#: Two groups: c00, c01, c02 about (0, 0) with c01 in the middle; c03, c04 about (9, 9).
GROUPS: dict[str, tuple[float, ...]] = {
    "c00": (0.0, 0.0),
    "c01": (1.0, 0.0),
    "c02": (2.0, 0.0),
    "c03": (9.0, 9.0),
    "c04": (9.0, 9.5),
}


@pytest.mark.parametrize("how", ["greedy", "lazy"])
def test_divfl_takes_one_of_each_group(how: str) -> None:
    members = crowd([1] * 5)
    selection = rule("divfl", fraction=0.4, divfl_gradients="ideal", divfl_greedy=how)
    asked = selection.candidates(1, members)
    assert asked == members
    assert selection.probe == "gradient"
    picks = names(selection.choose(1, asked, grads(**GROUPS)))
    # greedy's first is the medoid (sums of distances: c02 is nearest to the far group), then one far away
    sums = {a: sum(math.dist(GROUPS[a], GROUPS[b]) for b in GROUPS) for a in GROUPS}
    first = min(sums, key=lambda n: (sums[n], n))

    def cost(second: str) -> float:
        return sum(min(math.dist(GROUPS[k], GROUPS[s]) for s in (first, second)) for k in GROUPS)

    second = min((n for n in GROUPS if n != first), key=lambda n: (cost(n), n))
    assert picks == sorted([first, second])
    assert selection.weighting == "samples"


def test_divfl_ideal_asks_everyone_every_time() -> None:
    members = crowd([1] * 5)
    selection = rule("divfl", fraction=0.2, divfl_gradients="ideal")
    selection.choose(1, selection.candidates(1, members), grads(**GROUPS))
    assert selection.candidates(2, members) == members
    # c04 did not answer: it is out, although its gradient was known a round ago
    answers = grads(c00=(0.0, 0.0), c01=(0.0, 0.0), c02=(5.0, 0.0), c03=(5.0, 0.1))
    selection = rule("divfl", fraction=1.0, divfl_gradients="ideal")
    selection.choose(1, selection.candidates(1, members), grads(**GROUPS))
    assert names(selection.choose(2, selection.candidates(2, members), answers)) == names(members[:4])
    assert selection.choose(3, selection.candidates(3, members), {}) == []


def test_divfl_no_overhead_asks_once() -> None:
    members = crowd([1] * 5)
    selection = rule("divfl", fraction=0.2, divfl_gradients="no-overhead", seed=3)
    assert selection.reports == "gradient"
    assert rule("divfl", divfl_gradients="ideal").reports == rule("pow-d").reports == ""
    asked = selection.candidates(1, members)
    assert asked == members
    assert names(selection.choose(1, asked, grads(**GROUPS))) == ["c02"]
    # nothing new: nobody is asked, the same choice
    assert selection.candidates(2, members) == []
    assert names(selection.choose(2, [], {})) == ["c02"]
    # c02 trained and moved far away; now c01 is the medoid: sums 1+1+~... checked by brute force
    moved = {**GROUPS, "c02": (50.0, 50.0)}
    selection.observe(2, {}, {"c02": gradient(50.0, 50.0)})
    best = min(moved, key=lambda a: (sum(math.dist(moved[a], v) for v in moved.values()), a))
    assert best != "c02"
    assert selection.candidates(3, members) == []
    assert names(selection.choose(3, [], {})) == [best]
    # a new client is asked when first seen, and only it
    more = [*members, member("d")]
    assert names(selection.candidates(4, more)) == ["d"]
    selection.choose(4, [more[-1]], {})
    assert names(selection.candidates(5, more)) == ["d"]
    selection.choose(5, [more[-1]], grads(d=(1.0, 1.0)))
    assert selection.candidates(6, more) == []


def test_divfl_chosen_set_is_kept_in_a_window() -> None:
    members = crowd([1] * 5)
    selection = rule("divfl", fraction=0.4)
    picks = selection.choose(1, selection.candidates(1, members), grads(**GROUPS))
    assert selection.later(2, members) == (picks, 0)
    assert selection.later(2, [m for m in members if m != picks[0]]) == (picks[1:], 0)
    left = [m for m in members if m not in picks]
    found, keep = selection.later(2, left)
    assert keep == 0
    assert found == pick_clients(left, 0.4, 2023, 2)


def test_divfl_state_round_trip() -> None:
    members = crowd([1] * 5)
    selection = rule("divfl", fraction=0.4)
    assert selection.state() == {}
    picks = selection.choose(1, selection.candidates(1, members), grads(**GROUPS))
    state = selection.state()
    assert state["gradient/c04"].tolist() == [9.0, 9.5]
    again = rule("divfl", fraction=0.4)
    again.restore(state)
    assert again.candidates(2, members[::-1]) == []
    assert again.choose(2, [], {}) == picks
    again.restore({})
    assert again.candidates(3, members) == members


def test_divfl_forgets_gradients_of_another_size() -> None:
    members = crowd([1] * 3)
    selection = rule("divfl", fraction=0.4)
    selection.choose(1, selection.candidates(1, members), grads(c00=(0, 0), c01=(1, 1), c02=(2, 2)))
    selection.observe(1, {}, {"c01": gradient(1.0, 2.0, 3.0), "c00": gradient(1.0, 2.0, 3.0)})
    assert names(selection.candidates(2, members)) == ["c02"]
    # nor does it keep one that is not finite
    picks = selection.choose(2, [members[2]], {"c02": Answer({}, gradient(math.nan, 0.0, 0.0))})
    assert "c02" not in names(picks)
    assert names(selection.candidates(3, members)) == ["c02"]


def test_divfl_sketches_long_gradients() -> None:
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(2, 200_000)).astype(np.float32)
    members = crowd([1] * 6)
    answers = {
        m.name: Answer({}, {"w": centre[i % 2] + 0.01 * rng.normal(size=200_000).astype(np.float32)})
        for i, m in enumerate(members)
    }
    selection = rule("divfl", fraction=0.34)
    picks = names(selection.choose(1, selection.candidates(1, members), answers))
    assert len({int(n[1:]) % 2 for n in picks}) == 2
    assert all(row.nbytes <= 4 * 16384 for key, row in selection.state().items() if key != "size")


def test_divfl_stochastic_is_seeded() -> None:
    rng = np.random.default_rng(1)
    members = crowd([1] * 30)
    answers = {m.name: Answer({}, {"w": rng.normal(size=4)}) for m in members}

    def picks(seed: int, round_: int) -> list[str]:
        selection = rule("divfl", fraction=0.1, divfl_greedy="stochastic", seed=seed)
        return names(selection.choose(round_, selection.candidates(round_, members), answers))

    assert picks(1, 1) == picks(1, 1)
    assert len(picks(1, 1)) == 3
    assert len({tuple(picks(s, r)) for s in range(3) for r in range(1, 4)}) > 1


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="no selection is called 'auto'"):
        rule("auto")
