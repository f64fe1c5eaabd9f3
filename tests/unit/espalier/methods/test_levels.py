"""Who trains which size of sub-model: groups and ranks by hand, and what holds for every crowd."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.errors import ConfigError
from espalier.methods.levels import assign_levels, parse_levels
from espalier.methods.planning import Member
from espalier.methods.run_config import RunConfig


def config(**values: Any) -> RunConfig:
    return RunConfig(method="fjord", model="cnn", **values)


def client(name: str, *, level: float = 0.0, memory: int = 0, speed: float = 0.0) -> Member:
    return Member(name, 1, np.ones(2), ("edge",), level=level, memory=memory, speed=speed)


def test_parse() -> None:
    assert parse_levels("1,0.5,0.25") == (1.0, 0.5, 0.25)
    assert parse_levels(" 0.6 , 2e-1") == (0.6, 0.2)
    assert parse_levels("1") == (1.0,)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", 'levels: "" in "" is not a share in \\(0, 1\\]'),
        ("1,,0.5", 'levels: "" in'),
        ("1,half", 'levels: "half" in'),
        ("1.5,1", 'levels: "1.5" in'),
        ("1,0", 'levels: "0" in'),
        ("1,-0.5", 'levels: "-0.5" in'),
        ("nan", 'levels: "nan" in'),
        ("inf", 'levels: "inf" in'),
        ("0.25,1,0.5", 'does not descend; write "1,0.5,0.25"'),
        ("1,0.5,0.5", 'does not descend; write "1,0.5"'),
    ],
)
def test_parse_refuses(text: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        parse_levels(text)


def test_setting_is_checked_with_the_others() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flat({"levels": "0.5,1", "rounds": 0})
    assert str(caught.value).splitlines()[0] == "run configuration, 2 fault(s):"
    assert '  levels: "0.5,1" does not descend; write "1,0.5"' in str(caught.value).splitlines()


def test_spread_by_hand() -> None:
    """Seven clients, three levels: floor(i * 3 / 7) = 0 0 0 1 1 2 2."""
    members = [client(f"c{i}") for i in range(7)]
    found = assign_levels(members[::-1], config(), 5)
    assert list(found.items()) == [
        ("c0", 1.0),
        ("c1", 1.0),
        ("c2", 1.0),
        ("c3", 0.5),
        ("c4", 0.5),
        ("c5", 0.25),
        ("c6", 0.25),
    ]
    assert assign_levels(members[:2], config(), 1) == {"c0": 1.0, "c1": 0.5}
    assert assign_levels([], config(), 1) == {}


def test_device() -> None:
    members = [
        client("a", level=0.7),
        client("b", level=1.0),
        client("c", level=0.25),
        client("d", level=0.5),
    ]
    assert assign_levels(members, config(level_choice="device"), 1) == {
        "a": 0.5,
        "b": 1.0,
        "c": 0.25,
        "d": 0.5,
    }
    with pytest.raises(
        ConfigError, match=r"client e is set to level 0\.2, below the smallest of levels=1,0\.5,0\.25"
    ):
        assign_levels([*members, client("e", level=0.2)], config(level_choice="device"), 1)


def test_device_without_a_level_goes_by_memory() -> None:
    members = [
        client("a", memory=4),
        client("b", memory=2),
        client("c", memory=1),
        client("d", level=1.0, memory=3),
    ]
    # ranks by memory: a 0, d 1, b 2, c 3 of 4 -> numbers 0, 0, 1, 1 of two levels; d's own level wins
    found = assign_levels(members, config(level_choice="device", levels="0.8,0.4"), 1)
    assert found == {"a": 0.8, "b": 0.4, "c": 0.4, "d": 0.8}


def test_memory_by_fit() -> None:
    members = [client("a", memory=100), client("b", memory=60), client("c", memory=10), client("d")]
    found = assign_levels(members, config(level_choice="memory"), 1, need=lambda level: int(100 * level))
    assert found == {"a": 1.0, "b": 0.5, "c": 0.25, "d": 0.25}


def test_speed_by_rank() -> None:
    speeds = {"a": 1.0, "b": 8.0, "c": 2.0, "d": 8.0, "e": 0.0, "f": 4.0}
    members = [client(n, speed=s) for n, s in speeds.items()]
    # stronger than each: b 0, d 0, f 2, c 3, a 4 of 6 -> numbers 0 0 1 1 2 of three levels; e unknown
    found = assign_levels(members, config(level_choice="speed"), 1)
    assert found == {"a": 0.25, "b": 1.0, "c": 0.5, "d": 1.0, "e": 0.25, "f": 0.5}


def test_equal_devices_share_a_level() -> None:
    members = [client(f"c{i}", speed=3.0) for i in range(5)]
    assert set(assign_levels(members, config(level_choice="speed"), 1).values()) == {1.0}


def test_dynamic_levels_are_drawn_anew() -> None:
    members = [client(f"c{i:02d}") for i in range(30)]
    dynamic = config(dynamic_levels=True)
    rounds = [assign_levels(members, dynamic, r) for r in range(1, 41)]
    counts = Counter(level for found in rounds for level in found.values())
    # 1200 draws of chance 1/3: mean 400, standard deviation 16.3
    assert set(counts) == {1.0, 0.5, 0.25}
    assert all(abs(n - 400) < 66 for n in counts.values())
    assert rounds[0] != rounds[1]
    assert rounds[0] == assign_levels(members[::-1], dynamic, 1)
    # a client's draw does not depend on who else is there
    assert assign_levels(members[:3], dynamic, 4) == {m.name: rounds[3][m.name] for m in members[:3]}


def test_dynamic_levels_respect_the_device() -> None:
    members = [client("a", level=1.0), client("b", level=0.5), client("c", level=0.25)]
    dynamic = config(dynamic_levels=True, level_choice="device")
    seen = [assign_levels(members, dynamic, r) for r in range(1, 61)]
    assert {f["a"] for f in seen} == {1.0, 0.5, 0.25}
    assert {f["b"] for f in seen} == {0.5, 0.25}
    assert {f["c"] for f in seen} == {0.25}


LEVELS = st.lists(st.integers(1, 100), min_size=1, max_size=5, unique=True).map(
    lambda found: ",".join(str(v / 100) for v in sorted(found, reverse=True))
)
CLIENTS = st.lists(st.tuples(st.integers(0, 5), st.floats(0, 3)), min_size=1, max_size=25).map(
    lambda found: [client(f"c{i:02d}", memory=m, speed=s) for i, (m, s) in enumerate(found)]
)


@settings(max_examples=60)
@given(CLIENTS, LEVELS, st.sampled_from(["spread", "memory", "speed", "device"]), st.booleans())
def test_every_client_gets_one_of_the_levels(
    members: list[Member], text: str, choice: str, dynamic: bool
) -> None:
    chosen = config(levels=text, level_choice=choice, dynamic_levels=dynamic)
    found = assign_levels(members, chosen, 3)
    assert list(found) == [m.name for m in members]
    assert set(found.values()) <= set(parse_levels(text))
    assert found == assign_levels(members[::-1], chosen, 3)


@settings(max_examples=60)
@given(CLIENTS, LEVELS)
def test_stronger_is_never_smaller(members: list[Member], text: str) -> None:
    for choice in ("memory", "speed"):
        found = assign_levels(members, config(levels=text, level_choice=choice), 1)
        for a in members:
            for b in members:
                if getattr(a, choice) >= getattr(b, choice):
                    assert found[a.name] >= found[b.name]


@settings(max_examples=60)
@given(st.integers(1, 40), LEVELS)
def test_spread_groups_are_equal(count: int, text: str) -> None:
    found = assign_levels([client(f"c{i:02d}") for i in range(count)], config(levels=text), 1)
    sizes = Counter(found.values())
    levels = parse_levels(text)
    assert max(sizes.values()) - min(sizes[v] for v in levels) <= 1
    assert list(found.values()) == sorted(found.values(), reverse=True)
