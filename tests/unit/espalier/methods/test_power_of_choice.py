"""Power-of-Choice: its selections, alone and on a tree."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from espalier.methods.power_of_choice import adaptive_count
from espalier.methods.selection import Answer
from espalier_proto import espalier_pb2 as pb
from tests.support.by_hand import Call, in_round, network_loss, run_tree, same, small_tree, tapped
from tests.support.selections import chi_square, members_with, names, selection_of

SPEC = "digits:{i}/{of}:pathological=2"


def losses_of(architecture: pb.ArchitectureSpec, calls: Sequence[Call]) -> dict[str, float]:
    """Return F_k(w) of each call's client over all of its images, w being what it was sent, by plain torch."""
    return {
        c.plan.client: network_loss(architecture, c.sent, SPEC.format(i=c.plan.client[1:], of=30)).item()
        for c in calls
    }


def test_power_of_choice_trains_the_clients_of_largest_loss(tmp_path: Path) -> None:
    """With everyone a candidate the m of largest F_k(w) train, and the model becomes their plain mean."""
    tree = small_tree(tmp_path, 6, data=SPEC)
    calls = tapped(tree)
    run = run_tree(tree, "power-of-choice", 6, rounds=4, fraction=0.34, candidates=6, local_epochs=3)
    assert run.state is not None
    picks = []
    for round_ in range(1, 5):
        asked, picked = in_round(calls, round_, trains=False), in_round(calls, round_, trains=True)
        assert sorted(c.plan.client for c in asked) == [f"c{i}" for i in range(6)]
        losses = losses_of(run.state.architecture, asked)
        for call in asked:
            assert call.report.loss == pytest.approx(losses[call.plan.client], rel=1e-5)
        expected = sorted(losses, key=lambda c: -losses[c])[:2]
        assert sorted(c.plan.client for c in picked) == sorted(expected)
        picks.append(sorted(expected))
    assert len({tuple(p) for p in picks}) > 1
    last = in_round(calls, 4, trains=True)
    names = [t.name for t in run.state.architecture.tensors]
    same(run.state.tensors, {n: np.mean([c.payload[n] for c in last], axis=0) for n in names})


def test_edges_choose_by_their_own_model_in_later_rounds(tmp_path: Path) -> None:
    """Rg = 2: three of c0 … c3 and one of c4, c5 would be kept by shares m·d_e/d of m = 3 over 4 and 2: 2 and 1."""
    tree = small_tree(tmp_path, 6, data=SPEC, reach=lambda i: (int(i > 3),))
    calls = tapped(tree)
    run = run_tree(tree, "power-of-choice", 6, rounds=4, rg=2, fraction=0.5, candidates=6, local_epochs=3)
    assert run.state is not None
    for round_ in range(1, 5):
        asked, picked = in_round(calls, round_, trains=False), in_round(calls, round_, trains=True)
        losses = losses_of(run.state.architecture, asked)
        assert len(losses) == 6
        edges = {c.plan.client: c.plan.edge for c in asked}
        if round_ % 2:  # The window's first round: the cloud asks about the global model and ranks everyone.
            expected = sorted(losses, key=lambda c: -losses[c])[:3]
        else:
            expected = []
            for edge, keep in (("edge-1", 2), ("edge-2", 1)):
                own = [c for c in losses if edges[c] == edge]
                expected += sorted(own, key=lambda c: -losses[c])[:keep]
            # Each edge asks about what it sends to those who train, its own model.
            for call in picked:
                probe = next(c for c in asked if c.plan.client == call.plan.client)
                assert all(np.array_equal(probe.sent[n], a) for n, a in call.sent.items())
        assert sorted(c.plan.client for c in picked) == sorted(expected)
    first, second = ({c.plan.edge: c.sent for c in in_round(calls, r, trains=True)} for r in (1, 2))
    moved = [
        not np.array_equal(second[e]["hidden1.weight"], first[e]["hidden1.weight"])
        for e in second
        if e in first
    ]
    assert any(moved)


def test_candidates_are_fewer_than_everyone(tmp_path: Path) -> None:
    tree = small_tree(tmp_path, 6, data=SPEC)
    calls = tapped(tree)
    run = run_tree(tree, "power-of-choice", 6, rounds=3, fraction=0.34, candidates=3)
    assert run.state is not None
    for round_ in (1, 2, 3):
        asked, picked = in_round(calls, round_, trains=False), in_round(calls, round_, trains=True)
        assert len(asked) == 3
        losses = losses_of(run.state.architecture, asked)
        assert sorted(c.plan.client for c in picked) == sorted(sorted(losses, key=lambda c: -losses[c])[:2])


def test_remembered_losses_need_no_inquiry(tmp_path: Path) -> None:
    """rpow-d: who never trained comes first; later the largest mean training loss of the last participation."""
    tree = small_tree(tmp_path, 4, data=SPEC)
    calls = tapped(tree)
    run_tree(tree, "power-of-choice", 4, selection="rpow-d", rounds=5, fraction=0.5, candidates=4)
    assert all(c.trains for c in calls)
    remembered: dict[str, float] = {}
    for round_ in range(1, 6):
        picked = in_round(calls, round_, trains=True)
        names = sorted(c.plan.client for c in picked)
        if round_ == 1:
            assert len(names) == 2
        elif round_ == 2:
            assert not set(names) & set(remembered)
        else:
            assert names == sorted(sorted(remembered, key=lambda c: -remembered[c])[:2])
        remembered |= {c.plan.client: c.report.loss for c in picked}
    assert len(remembered) == 4


def losses(**values: float) -> dict[str, Answer]:
    return {name: Answer({"loss": value}) for name, value in values.items()}


def test_everyone_a_candidate_gives_the_largest_losses() -> None:
    """D = K takes the m largest losses, ties by name."""
    members = members_with([1, 9, 5, 2, 7])
    selection = selection_of("pow-d", fraction=0.4, candidates=5)
    for round_ in range(1, 10):
        asked = selection.candidates(round_, members)
        assert asked == members
        picks = selection.choose(round_, asked, losses(c00=1.0, c01=3.0, c02=0.5, c03=2.0, c04=2.0))
        assert names(picks) == ["c01", "c03"]
    assert selection.probe == "loss"
    assert selection.weighting == "uniform"


def test_a_large_clients_loss_can_be_given_more_say() -> None:
    """n_k F_k of c00 … c04: 1·1 = 1, 9·0.25 = 2.25, 5·0.5 = 2.5, 2·2 = 4, 7·0 = 0."""
    members = members_with([1, 9, 5, 2, 7])
    told = losses(c00=1.0, c01=0.25, c02=0.5, c03=2.0, c04=0.0)
    for weight, expected in (("none", ["c00", "c03"]), ("samples", ["c02", "c03"])):
        selection = selection_of("pow-d", fraction=0.4, candidates=5, loss_weight=weight)
        assert names(selection.choose(1, selection.candidates(1, members), told)) == expected
        remembered = selection_of("rpow-d", fraction=0.4, candidates=5, loss_weight=weight)
        remembered.observe(1, {name: answer.metrics for name, answer in told.items()}, {})
        assert names(remembered.candidates(2, members)) == expected


def test_only_who_answered_is_chosen() -> None:
    members = members_with([1] * 5)
    selection = selection_of("pow-d", fraction=0.4, candidates=5)
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
    """D = m is sampling ∝ p_k, whatever the losses."""
    members = members_with([1, 2, 3, 4])
    selection = selection_of(name, fraction=0.5, candidates=2, seed=11)
    expected = successive({"c00": 0.1, "c01": 0.2, "c02": 0.3, "c03": 0.4}, 2)
    found: Counter[tuple[str, ...]] = Counter()
    answers = losses(c00=9.0, c01=1.0, c02=5.0, c03=0.0)
    for round_ in range(1, 3001):
        asked = selection.candidates(round_, members)
        found[tuple(names(selection.choose(round_, asked, answers)))] += 1
        assert selection.later(round_, members) == (asked, 0)
    assert chi_square(found, expected) < 20.5  # 5 degrees of freedom, 0.1 %


def test_number_of_candidates() -> None:
    members = members_with([1] * 10)

    def count(**settings: object) -> int:
        return len(selection_of("pow-d", **settings).candidates(1, members))

    assert count(fraction=0.3) == 6
    assert count(fraction=0.8) == 10
    assert count(fraction=0.3, candidates=1) == 3
    assert count(fraction=0.3, candidates=7) == 7
    assert count(fraction=0.3, candidates=99) == 10
    assert (
        len(selection_of("pow-d", fraction=0.5, candidates=4).candidates(1, members_with([0, 5, 0, 0, 5, 5])))
        == 3
    )
    assert (
        len(selection_of("pow-d", fraction=0.5, candidates=4).candidates(1, members_with([0, 0, 0, 0, 0])))
        == 4
    )


def test_later_rounds_are_for_the_edges() -> None:
    members = members_with([1] * 10)
    for name, probe in (("pow-d", "loss"), ("cpow-d", "batch-loss")):
        selection = selection_of(name, fraction=0.3)
        found, keep = selection.later(2, members)
        assert (len(found), keep) == (6, 3)
        assert found == selection.candidates(2, members)
        assert selection.probe == probe


def test_remembered_losses() -> None:
    members = members_with([1] * 6)
    selection = selection_of("rpow-d", fraction=0.34, candidates=6, seed=4)
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

    again = selection_of("rpow-d", fraction=0.34, candidates=6, seed=4)
    state = selection.state()
    assert state["loss"]["c03"].shape == (1,)
    again.restore(state)
    assert again.state() == state
    assert again.candidates(5, members) == selection.candidates(5, members)


def test_unseen_ties_are_drawn_anew_in_every_round() -> None:
    members = members_with([1] * 6)
    selection = selection_of("rpow-d", fraction=0.17, candidates=6, seed=4)
    found = Counter(names(selection.candidates(r, members))[0] for r in range(1, 301))
    # 300 draws among six: mean 50, standard deviation 6.5
    assert set(found) == set(names(members))
    assert max(found.values()) < 80
    twin = selection_of("rpow-d", fraction=0.17, candidates=6, seed=4)
    assert twin.candidates(3, members) == selection.candidates(3, members)


def test_adaptive_schedule() -> None:
    """N = 16, m = 3: d = 16, 8, 4, 3, each for a quarter of the run."""
    assert [adaptive_count(r, 8, 16, 3) for r in range(1, 9)] == [16, 16, 8, 8, 4, 4, 3, 3]
    # N = 10, m = 2: d = 10, 5, 3, 2 over 6 rounds: stage floor((r - 1) * 4 / 6)
    assert [adaptive_count(r, 6, 10, 2) for r in range(1, 7)] == [10, 10, 5, 3, 3, 2]
    assert [adaptive_count(r, 3, 4, 4) for r in range(1, 4)] == [4, 4, 4]
    assert adaptive_count(1, 1, 100, 1) == 100
    members = members_with([1] * 16)
    selection = selection_of("pow-d", fraction=0.1875, adaptive_candidates=True, candidates=5, rounds=8)
    assert [len(selection.candidates(r, members)) for r in range(1, 9)] == [16, 16, 8, 8, 4, 4, 3, 3]
    assert [selection.later(r, members)[1] for r in range(1, 9)] == [3, 3, 3, 3, 3, 3, 0, 0]
