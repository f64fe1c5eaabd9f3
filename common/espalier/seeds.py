"""Seeds that depend on run, name, round and purpose, and not on arrival order, node ids or process ids."""

from __future__ import annotations

import hashlib

import numpy as np


def seed_for(run_seed: int, name: str, round_: int, purpose: str) -> int:
    """Derive a 63-bit seed for one purpose of one participant in one round.

    Parameters
    ----------
    run_seed : int
        The run's `seed` setting.
    name : str
        Name of the client, edge or "cloud".
    round_ : int
        Round of the randomness; 0 for what happens once per run.
    purpose : str
        Purpose, e.g. ``"train"``, ``"selection"``.

    Returns
    -------
    int
        A seed in [0, 2**63), fit for numpy and torch generators.
    """
    text = "\x1f".join((str(run_seed), name, str(round_), purpose)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def rng_for(run_seed: int, name: str, round_: int, purpose: str) -> np.random.Generator:
    """Return a numpy generator seeded by :func:`seed_for`."""
    return np.random.default_rng(seed_for(run_seed, name, round_, purpose))
