"""ShapeFL's edges against brute force over every association, and against cases plain to see."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from espalier.methods.planning import Member, plan_window
from espalier.methods.shape import ByShape, Problem


def client(name: str, labels: Sequence[float], **links: float) -> Member:
    return Member(
        name, int(sum(labels)), np.array(labels, dtype=np.float64), tuple(sorted(links)), links=links
    )


def objective(
    members: Sequence[Member], plan: dict[str, str], diversity: float, rounds: int, opened: Sequence[str]
) -> float:
    """J, written again with plain loops from the module's formula."""
    links = [s for m in members for s in m.links.values()]
    mean = sum(links) / len(links)
    total = sum(m.links[plan[m.name]] for m in members) * rounds + len(opened) * mean
    mixed = 0.0
    for edge in opened:
        there = [m for m in members if plan[m.name] == edge]
        held = sum(m.samples for m in there)
        pairs = 0.0
        for a, b in itertools.combinations(there, 2):
            cosine = float(a.labels @ b.labels) / math.sqrt(
                float(a.labels @ a.labels) * float(b.labels @ b.labels)
            )
            pairs += (1 - cosine) * a.samples * b.samples
        if held > 1:
            mixed += pairs / math.comb(held, 2)
    return total / (rounds * len(members) * mean) - diversity * mixed / len(opened)


def brute(
    members: Sequence[Member], diversity: float, rounds: int, bound: int, count: int = 0
) -> tuple[int, float]:
    """Return the least (clients above the bound, J) over all sets of open edges and all associations."""
    edges = sorted({e for m in members for e in m.edges})
    best = (len(members), math.inf)
    for choice in itertools.product(*(m.edges for m in members)):
        plan = {m.name: e for m, e in zip(members, choice, strict=True)}
        above = sum(max(0, choice.count(e) - bound) for e in edges)
        used = set(choice)
        for size in [count] if count else range(len(used), len(edges) + 1):
            for opened in itertools.combinations(edges, size):
                if used <= set(opened):
                    best = min(best, (above, objective(members, plan, diversity, rounds, opened)))
    return best


def instance(seed: int, clients: int = 6, edges: int = 3) -> list[Member]:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(clients):
        labels = rng.integers(0, 30, 4) * (rng.random(4) < 0.5)
        labels[i % 4] += 1
        reach = [e for e in range(edges) if rng.random() < 0.8] or [0]
        found.append(client(f"c{i}", labels.tolist(), **{f"e{e}": float(rng.uniform(0.1, 2)) for e in reach}))
    return found


@pytest.mark.parametrize("diversity", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("count", [0, 2])
def test_is_close_to_brute_force(diversity: float, count: int) -> None:
    reached, gaps = 0, []
    for seed in range(12):
        members = instance(seed)
        edges = sorted({e for m in members for e in m.edges})
        covered = any(
            all(set(pair) & set(m.edges) for m in members) for pair in itertools.combinations(edges, 2)
        )
        if count and not covered:
            continue
        problem = Problem(members, diversity, 5, count)
        plan = ByShape(diversity, count, 5).associate(members)
        assert all(plan[m.name] in m.edges for m in members)
        best = brute(members, diversity, 5, problem.bound, count)
        used = sorted(set(plan.values()))
        opened = (used + [e for e in edges if e not in used])[:count] if count else used
        above = sum(max(0, list(plan.values()).count(e) - problem.bound) for e in edges)
        found = (above, objective(members, plan, diversity, 5, opened))
        columns = np.array([problem.edges.index(plan[n]) for n in problem.names])
        assert problem.score(columns, frozenset(problem.edges.index(e) for e in opened)) == pytest.approx(
            found
        )
        assert found[0] == best[0]
        assert found[1] >= best[1] - 1e-9
        reached += found[1] <= best[1] + 1e-9
        gaps.append(found[1] - best[1])
    assert len(gaps) >= 8
    assert reached >= 0.9 * len(gaps)
    assert max(gaps) <= 0.05 * max(1.0, diversity)


def test_moves_never_make_the_greedy_worse() -> None:
    for seed in range(20):
        problem = Problem(instance(seed, clients=14), 3.0, 5)
        opened = frozenset(range(3))
        greedy = problem.associate(opened)
        better = problem._improve(greedy, opened)
        assert problem.score(better, opened) <= problem.score(greedy, opened)
        for n in range(14):
            for e in range(3):
                moved = better.copy()
                moved[n] = e
                if math.isfinite(problem.cost[n, e]):
                    assert problem.score(moved, opened)[0] >= problem.score(better, opened)[0]
                    assert problem.score(moved, opened) >= (
                        problem.score(better, opened)[0],
                        problem.score(better, opened)[1] - 1e-9,
                    )
        for n, k in itertools.combinations(range(14), 2):
            moved = better.copy()
            moved[n], moved[k] = better[k], better[n]
            if np.isfinite(problem.cost[[n, k], moved[[n, k]]]).all():
                assert problem.score(moved, opened)[1] >= problem.score(better, opened)[1] - 1e-9


def test_cost_alone_takes_the_nearest_edge() -> None:
    members = [client(f"c{i}", [5, 5], east=1.0 + (i % 2) * 9, west=10.0 - (i % 2) * 9) for i in range(6)]
    plan = ByShape(0.0, 0, 10).associate(members)
    assert plan == {f"c{i}": ("west" if i % 2 else "east") for i in range(6)}


def test_diversity_mixes_each_edge() -> None:
    """Four clients of two labels each, links equal: with two edges each one gets both labels."""
    members = [client(f"c{i}", [10, 0] if i < 2 else [0, 10], east=1.0, west=1.0) for i in range(4)]
    plan = ByShape(10.0, 2).associate(members)
    assert {plan["c0"], plan["c1"]} == {plan["c2"], plan["c3"]} == {"east", "west"}
    # each edge: S D D / C(20, 2) = 100 / 190; J = 4/4 + 2/4 - 10 * 100/190
    problem = Problem(members, 10.0, 1, 2)
    columns = np.array([problem.edges.index(plan[n]) for n in problem.names])
    above, found = problem.score(columns, frozenset({0, 1}))
    assert above == 0
    assert found == pytest.approx(1.5 - 1000 / 190)


def test_links_that_were_not_measured_count_as_the_mean() -> None:
    a = Member("a", 2, np.ones(2), ("e1", "e2"), links={"e1": 3.0})
    b = Member("b", 2, np.ones(2), ("e1", "e2"), links={"e1": 1.0})
    assert Problem([a, b], 1.0, 5).cost.tolist() == [[0.75, 0.5], [0.25, 0.5]]
    assert Problem([Member("a", 2, np.ones(2), ("e1", "e2"))], 1.0, 5).cost.tolist() == [[1.0, 1.0]]


def test_clients_of_one_edge_go_above_the_bound() -> None:
    members = [client(f"c{i}", [1, 1], east=1.0) for i in range(5)] + [client("d", [1, 1], west=1.0)]
    plan = ByShape(1.0).associate(members)
    assert plan == {**{f"c{i}": "east" for i in range(5)}, "d": "west"}
    # one edge cannot reach everyone, though one is asked for
    assert ByShape(1.0, 1).associate(members) == plan


def test_picks_take_their_share_of_one_association() -> None:
    members = instance(3, clients=8)
    rule = ByShape(1.0, 0, 5)
    whole = rule.associate(members)
    plan = plan_window([members[:3], members[2:6], members], members, rule, first_round=4, seed=1)
    assert plan == [{m.name: whole[m.name] for m in part} for part in (members[:3], members[2:6], members)]
    assert plan_window([members[::-1]], members[::-1], ByShape(1.0, 0, 5), first_round=1, seed=9) == [whole]
    assert plan_window([[]], [], rule, first_round=1, seed=1) == [{}]
    # who has left no longer counts
    left = [m for m in members if m.name != "c0"]
    assert plan_window([left], left, rule, first_round=1, seed=1) == [ByShape(1.0, 0, 5).associate(left)]


def test_hundred_clients_take_seconds_at_most() -> None:
    members = instance(1, clients=100, edges=5)
    plan = ByShape(1.0, 0, 5).associate(members)
    assert max(list(plan.values()).count(e) for e in plan.values()) <= 30
