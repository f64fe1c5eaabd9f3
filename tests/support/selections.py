"""What the tests of client selection share: members, a selection by name, and a goodness-of-fit statistic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from espalier.methods.planning import Member
from espalier.methods.run_config import RunConfig
from espalier.methods.selection import Selection, create_selection


def member(name: str, samples: int = 10) -> Member:
    """Return a member that is connected to one edge."""
    return Member(name, samples, np.ones(2), ("edge-1",))


def members_with(samples: Sequence[int]) -> list[Member]:
    """Return members c00, c01, … with the given numbers of samples."""
    return [member(f"c{i:02d}", n) for i, n in enumerate(samples)]


def names(members: Sequence[Member]) -> list[str]:
    return [m.name for m in members]


def selection_of(name: str, **settings: object) -> Selection:
    """Return a selection with the given settings, underscores for the dashes of their keys."""
    keys = {key.replace("_", "-"): value for key, value in settings.items()}
    return create_selection(RunConfig.from_flat({"selection": name, **keys}), name)


def chi_square(found: Counter[tuple[str, ...]], expected: Mapping[tuple[str, ...], float]) -> float:
    """Return Pearson's statistic; `expected` are probabilities."""
    assert set(found) <= set(expected)
    total = sum(found.values())
    return sum((found[k] - total * p) ** 2 / (total * p) for k, p in expected.items())
